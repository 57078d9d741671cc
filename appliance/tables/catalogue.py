"""What the tables should hold, as Python values, and the changes that bring them there.

Owned by the supervisor. ``update`` compares the wanted entries of some addresses with those in force and publishes the
difference as one epoch; what did not change is not touched, so a notice about one instance costs one entry, however
large the tables are. ``replace`` does so for all addresses.

A host's *generation* is the identity of the instance behind an address: it changes when the address gets another
instance, and not when the instance's node gets another underlay address. Flows carry it.

On a full table the change stops at the row that did not fit; ``update`` raises, and whoever calls it with the same
addresses again tries the rest again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from appliance import limits
from appliance.tables import layout
from appliance.tables.layout import IPAddress
from appliance.tables.publish import Publisher

POLICIES = {"rr": layout.POLICY_RR, "instance": layout.POLICY_INSTANCE}


@dataclass(frozen=True)
class Host:
    """A container on the overlay. ``owner`` names the instance (``job.number``)."""

    address: IPAddress
    node: IPAddress
    port: int
    instance_ip: IPAddress | None = None
    local: bool = False
    owner: str = ""


@dataclass(frozen=True)
class Service:
    """A ServiceIP: which policy chooses among which namespace addresses, with which weights (default: all 1)."""

    address: IPAddress
    policy: str
    backends: tuple[IPAddress, ...]
    weights: tuple[int, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Change:
    """What one ``update`` did, by address."""

    epoch: int
    hosts: tuple[IPAddress, ...] = ()
    services: tuple[IPAddress, ...] = ()
    services_removed: tuple[IPAddress, ...] = ()
    hosts_removed: tuple[IPAddress, ...] = ()

    @property
    def changed(self) -> list[str]:
        """A few words for each entry."""
        return [
            *(f"host {address}" for address in self.hosts),
            *(f"service {address}" for address in self.services),
            *(f"service {address} removed" for address in self.services_removed),
            *(f"host {address} removed" for address in self.hosts_removed),
        ]


class Catalogue:
    """The wanted content of the tables, and its way into them."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._hosts: dict[IPAddress, Host] = {}
        self._services: dict[IPAddress, Service] = {}
        self._generations: dict[IPAddress, int] = {}
        self._ordinals: dict[IPAddress, int] = {}
        self._free_ordinals = list(range(publisher.capacity.services - 1, -1, -1))
        self._generation = 0

    @property
    def hosts(self) -> Mapping[IPAddress, Host]:
        """Hosts in force, by namespace address."""
        return self._hosts

    @property
    def services(self) -> Mapping[IPAddress, Service]:
        """Services in force, by ServiceIP."""
        return self._services

    def replace(self, hosts: Iterable[Host], services: Iterable[Service]) -> Change:
        """Make these the content of the tables. Raises ``publish.TableFullError``."""
        wanted_hosts: dict[IPAddress, Host | None] = dict.fromkeys(self._hosts)
        wanted_hosts.update((host.address, host) for host in hosts)
        wanted_services: dict[IPAddress, Service | None] = dict.fromkeys(self._services)
        wanted_services.update((service.address, service) for service in services)
        return self.update(wanted_hosts, wanted_services)

    def update(self, hosts: Mapping[IPAddress, Host | None], services: Mapping[IPAddress, Service | None]) -> Change:
        """Give these addresses these entries, or none; all others stay. Raises ``publish.TableFullError``.

        Hosts come first and go last, so that no ServiceIP ever leads to an address that the host table lacks.
        """
        put_hosts = [it for address, it in hosts.items() if it is not None and it != self._hosts.get(address)]
        put_services = [it for address, it in services.items() if it is not None and it != self._services.get(address)]
        no_services = [it for it, service in services.items() if service is None and it in self._services]
        no_hosts = [it for it, host in hosts.items() if host is None and it in self._hosts]
        self._put_hosts(put_hosts)
        self._put_services(put_services)
        for address in no_services:
            self._remove_service(address)
        for address in no_hosts:
            self._remove_host(address)
        is_change = put_hosts or put_services or no_services or no_hosts
        return Change(
            self._publisher.publish() if is_change else self._publisher.epoch,
            tuple(host.address for host in put_hosts),
            tuple(service.address for service in put_services),
            tuple(no_services),
            tuple(no_hosts),
        )

    def _put_hosts(self, hosts: list[Host]) -> None:
        if not hosts:
            return
        for host in hosts:
            known = self._hosts.get(host.address)
            if known is None or (known.owner, known.instance_ip) != (host.owner, host.instance_ip):
                self._generation += 1
                self._generations[host.address] = self._generation
        self._publisher.put_hosts(host_rows(hosts, self._generations))
        self._hosts.update((host.address, host) for host in hosts)

    def _put_services(self, services: list[Service]) -> None:
        if not services:
            return
        for service in services:
            if service.address not in self._ordinals:
                if not self._free_ordinals:
                    self._publisher.refuse_service()
                self._ordinals[service.address] = self._free_ordinals.pop()
        rows = service_rows(services, self._ordinals)
        self._publisher.put_services(rows, [choice_rows(service) for service in services])
        self._services.update((service.address, service) for service in services)

    def _remove_host(self, address: IPAddress) -> None:
        self._publisher.remove_host(*layout.words(address))
        del self._hosts[address], self._generations[address]

    def _remove_service(self, address: IPAddress) -> None:
        self._publisher.remove_service(*layout.words(address))
        del self._services[address]
        self._free_ordinals.append(self._ordinals.pop(address))


def host_rows(hosts: Iterable[Host], generations: Mapping[IPAddress, int]) -> Any:
    """Rows of ``layout.HOST``."""
    return np.array([_host_values(host, generations[host.address]) for host in hosts], dtype=layout.HOST)


def _host_values(host: Host, generation: int) -> tuple[int, ...]:
    instance = layout.words(host.instance_ip) if host.instance_ip else (0, 0)
    flags = layout.HOST_LOCAL if host.local else 0
    return (*layout.words(host.address), *layout.words(host.node), *instance, generation, 0, host.port, flags, 0)


def service_rows(services: list[Service], ordinals: Mapping[IPAddress, int]) -> Any:
    """Rows of ``layout.SERVICE``, their choices yet to be placed."""
    rows = np.zeros(len(services), dtype=layout.SERVICE)
    addresses = np.array([layout.words(service.address) for service in services], dtype=np.int64)
    rows["address_hi"], rows["address_lo"] = addresses[:, 0], addresses[:, 1]
    rows["ordinal"] = [ordinals[service.address] for service in services]
    rows["policy"] = [POLICIES[service.policy] for service in services]
    return rows


def choice_rows(service: Service) -> Any:
    """The choice list: each backend as often as its weight says, spread evenly (smooth weighted round robin)."""
    order = spread(service.weights) if service.weights else range(len(service.backends))
    return np.array([layout.words(service.backends[i]) for i in order], dtype=layout.CHOICE)


def spread(weights: Iterable[int]) -> list[int]:
    """Indices, each as often as its weight, as evenly as possible; at most about ``limits.CHOICES_MAX``."""
    counts = _scaled(list(weights))
    current, total, order = [0] * len(counts), sum(counts), []
    for _ in range(total):
        current = [value + count for value, count in zip(current, counts, strict=True)]
        best = max(range(len(counts)), key=current.__getitem__)
        current[best] -= total
        order.append(best)
    return order


def _scaled(weights: list[int]) -> list[int]:
    divisor = math.gcd(*weights) or 1
    counts = [weight // divisor for weight in weights]
    if sum(counts) > limits.CHOICES_MAX:
        factor = limits.CHOICES_MAX / sum(counts)
        counts = [max(1, int(count * factor)) if count else 0 for count in counts]
    return counts
