"""What the tables should hold, as Python values, and the changes that bring them there.

Owned by the supervisor. ``replace`` compares the wanted entries with those in force and publishes the difference as one
epoch; what did not change is not touched, so a notice about one instance costs one entry, however large the tables are.

A host's *generation* is the identity of the instance behind an address: it changes when the address gets another
instance, and not when the instance's node gets another underlay address. Flows carry it.

On a full table the change stops at the row that did not fit; ``replace`` raises, and the next one tries the rest again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from appliance import limits
from appliance.tables import layout
from appliance.tables.layout import IPAddress
from appliance.tables.publish import Publisher, TableFullError

NODES_AT_ONCE = 64
"""Nodes that a full table refuses together."""

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
class Node:
    """A node that packets may come from and go to. ``mtu``: of the path to it on the underlay, bytes, 0 if unknown.

    ``ours``: it runs this appliance, and so translates an instance IP that is a packet's destination on the wire.
    """

    address: IPAddress
    port: int
    mtu: int = 0
    ours: bool = False


@dataclass
class Change:
    """What one ``replace`` did."""

    epoch: int
    changed: list[str] = field(default_factory=list)


class Catalogue:
    """The wanted content of the tables, and its way into them."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._hosts: dict[IPAddress, Host] = {}
        self._services: dict[IPAddress, Service] = {}
        self._nodes: dict[IPAddress, Node] = {}
        self._generations: dict[IPAddress, int] = {}
        self._ordinals: dict[IPAddress, int] = {}
        self._free_ordinals = list(range(publisher.capacity.services - 1, -1, -1))
        self._generation = 0
        self.on_host: Callable[[Host | None, Host | None], None] = lambda _before, _after: None
        """Called with each host's entry before and after a change, once the change is in the table."""

    @property
    def hosts(self) -> Mapping[IPAddress, Host]:
        """Hosts in force, by namespace address."""
        return self._hosts

    @property
    def services(self) -> Mapping[IPAddress, Service]:
        """Services in force, by ServiceIP."""
        return self._services

    @property
    def nodes(self) -> Mapping[IPAddress, Node]:
        """Nodes in force, by underlay address."""
        return self._nodes

    def replace_nodes(self, nodes: Iterable[Node]) -> Change:
        """Make these the nodes of the tables. Raises ``publish.TableFullError``."""
        wanted = {node.address: node for node in nodes}
        gone = [address for address in self._nodes if address not in wanted]
        return self.change_nodes(wanted.values(), gone)

    def change_nodes(self, put: Iterable[Node], remove: Iterable[IPAddress] = ()) -> Change:
        """Put these nodes in, and take those out; all others stay. Costs what it is given, not what there is.

        Raises ``publish.TableFullError``: then the portion that did not fit, and those after it, are not in.
        """
        gone = [address for address in remove if address in self._nodes]
        fresh = [node for node in put if self._nodes.get(node.address) != node]
        for address in gone:
            self._publisher.remove_node(*layout.words(address))
            del self._nodes[address]
        for start in range(0, len(fresh), NODES_AT_ONCE):
            self._put_nodes(fresh[start : start + NODES_AT_ONCE])
        changed = [f"node {node.address}" for node in fresh] + [f"node {address} removed" for address in gone]
        epoch = self._publisher.publish() if changed else self._publisher.epoch
        return Change(epoch, changed)

    def _put_nodes(self, nodes: list[Node]) -> None:
        """All or none of those that are new: no row may be in the table that nobody would take out of it again."""
        try:
            self._publisher.put_nodes(node_rows(nodes))
        except TableFullError:
            for address in (node.address for node in nodes if node.address not in self._nodes):
                self._publisher.remove_node(*layout.words(address))
            self._publisher.publish()
            raise
        self._nodes.update((node.address, node) for node in nodes)

    def replace(self, hosts: Iterable[Host], services: Iterable[Service]) -> Change:
        """Make these the content of the tables. Raises ``publish.TableFullError``.

        Hosts come first and go last, so that no ServiceIP ever leads to an address that the host table lacks.
        """
        wanted_hosts = {host.address: host for host in hosts}
        wanted_services = {service.address: service for service in services}
        changed = self._put_hosts([h for h in wanted_hosts.values() if self._hosts.get(h.address) != h])
        changed += self._put_services([s for s in wanted_services.values() if self._services.get(s.address) != s])
        for address in [a for a in self._services if a not in wanted_services]:
            self._remove_service(address)
            changed.append(f"service {address} removed")
        for address in [a for a in self._hosts if a not in wanted_hosts]:
            self._remove_host(address)
            changed.append(f"host {address} removed")
        epoch = self._publisher.publish() if changed else self._publisher.epoch
        return Change(epoch, changed)

    def _put_hosts(self, hosts: list[Host]) -> list[str]:
        if not hosts:
            return []
        for host in hosts:
            known = self._hosts.get(host.address)
            if known is None or (known.owner, known.instance_ip) != (host.owner, host.instance_ip):
                self._generation += 1
                self._generations[host.address] = self._generation
        self._publisher.put_hosts(host_rows(hosts, self._generations))
        for host in hosts:
            before = self._hosts.get(host.address)
            self._hosts[host.address] = host
            self.on_host(before, host)
        return [f"host {host.address}" for host in hosts]

    def _put_services(self, services: list[Service]) -> list[str]:
        if not services:
            return []
        for service in services:
            if service.address not in self._ordinals:
                if not self._free_ordinals:
                    self._publisher.refuse_service()
                self._ordinals[service.address] = self._free_ordinals.pop()
        rows = service_rows(services, self._ordinals)
        self._publisher.put_services(rows, [choice_rows(service) for service in services])
        self._services.update((service.address, service) for service in services)
        return [f"service {service.address}" for service in services]

    def _remove_host(self, address: IPAddress) -> None:
        self._publisher.remove_host(*layout.words(address))
        self.on_host(self._hosts.pop(address), None)
        del self._generations[address]

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


def node_rows(nodes: Iterable[Node]) -> Any:
    """Rows of ``layout.NODE``."""
    rows = [(*layout.words(it.address), 0, it.mtu, it.port, layout.NODE_OURS if it.ours else 0, 0, 0) for it in nodes]
    return np.array(rows, dtype=layout.NODE)


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
