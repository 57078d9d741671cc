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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from appliance import limits
from appliance.tables import layout
from appliance.tables.layout import IPAddress
from appliance.tables.publish import Publisher, TableFullError

NODES_AT_ONCE = 64
"""Nodes that a full table refuses together."""

NOWHERE = IPv6Address(0)
"""In place of an instance IP that there is not: both words zero."""
Entry = TypeVar("Entry")
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
        self._nodes: dict[IPAddress, Node] = {}
        self._generations: dict[IPAddress, int] = {}
        self._ordinals: dict[IPAddress, int] = {}
        self._free_ordinals: list[int] = []
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

    def replace_nodes(self, nodes: Iterable[Node]) -> bool:
        """Make these the nodes of the tables; whether that changed anything. Raises ``publish.TableFullError``."""
        wanted = {node.address: node for node in nodes}
        gone = {address: None for address in self._nodes if address not in wanted}
        return self.update_nodes({**gone, **wanted})

    def update_nodes(self, nodes: Mapping[IPAddress, Node | None]) -> bool:
        """Give these addresses these nodes, or none; all others stay. Costs what it is given, not what there is.

        Raises ``publish.TableFullError``: then the portion that did not fit, and those after it, are not in.
        """
        fresh = [node for at, node in nodes.items() if node is not None and node != self._nodes.get(at)]
        gone = [at for at, node in nodes.items() if node is None and at in self._nodes]
        for address in gone:
            self._publisher.remove_node(*layout.words(address))
            del self._nodes[address]
        for start in range(0, len(fresh), NODES_AT_ONCE):
            self._put_nodes(fresh[start : start + NODES_AT_ONCE])
        if fresh or gone:
            self._publisher.publish()
        return bool(fresh or gone)

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
        """Make these the content of the tables. Raises ``publish.TableFullError``."""
        wanted_hosts: dict[IPAddress, Host | None] = dict.fromkeys(self._hosts)
        wanted_hosts.update((host.address, host) for host in hosts)
        wanted_services: dict[IPAddress, Service | None] = dict.fromkeys(self._services)
        wanted_services.update((service.address, service) for service in services)
        return self.update(wanted_hosts, wanted_services)

    def update(self, hosts: Mapping[IPAddress, Host | None], services: Mapping[IPAddress, Service | None]) -> Change:
        """Give these addresses these entries, or none; all others stay. Raises ``publish.TableFullError``.

        Hosts come first and go last, so that no ServiceIP ever leads to an address that the host table lacks; on a full
        table what goes makes room first.
        """
        put_hosts = {at: it for at, it in hosts.items() if it is not None and it != self._hosts.get(at)}
        put_services = {at: it for at, it in services.items() if it is not None and it != self._services.get(at)}
        no_services = tuple(at for at, it in services.items() if it is None and at in self._services)
        no_hosts = tuple(at for at, it in hosts.items() if it is None and at in self._hosts)
        try:
            self._put(put_hosts, put_services)
        except TableFullError:
            self._give_back_ordinals()
            if not no_services and not no_hosts:
                raise
            self._remove(no_services, no_hosts)  # what is to go must not stand in the way of what is to come
            self._publisher.publish()
            try:
                self._put(put_hosts, put_services)
            finally:
                self._give_back_ordinals()
        else:
            self._remove(no_services, no_hosts)
        is_change = put_hosts or put_services or no_services or no_hosts
        epoch = self._publisher.publish() if is_change else self._publisher.epoch
        return Change(epoch, tuple(put_hosts), tuple(put_services), no_services, no_hosts)

    def _put(self, hosts: Mapping[IPAddress, Host], services: Mapping[IPAddress, Service]) -> None:
        self._put_hosts(hosts)
        self._put_services(services)

    def _remove(self, services: Iterable[IPAddress], hosts: Iterable[IPAddress]) -> None:
        for address in services:
            self._remove_service(address)
        for address in hosts:
            self._remove_host(address)

    def _put_hosts(self, hosts: Mapping[IPAddress, Host]) -> None:
        if hosts:
            generations = [self._generation_of(host) for host in hosts.values()]
            before = {address: self._hosts.get(address) for address in hosts}
            try:
                with _recording(self._hosts, hosts):
                    self._publisher.put_hosts(host_rows(hosts.values(), generations))
            finally:
                self._tell(before)

    def _tell(self, before: Mapping[IPAddress, Host | None]) -> None:
        """What has become of these addresses, to whoever follows hosts."""
        for address, host in before.items():
            now = self._hosts.get(address)
            if now is not host:
                self.on_host(host, now)

    def _generation_of(self, host: Host) -> int:
        """A host's generation, which is another one if the address gets another instance."""
        known = self._hosts.get(host.address)
        if known is None or (known.owner, known.instance_ip) != (host.owner, host.instance_ip):
            self._generation += 1
            self._generations[host.address] = self._generation
        return self._generations[host.address]

    def _put_services(self, services: Mapping[IPAddress, Service]) -> None:
        if services:
            ordinals = [self._ordinal_of(address) for address in services]
            with _recording(self._services, services):
                self._publisher.put_services(service_rows(services.values(), ordinals), choice_rows(services.values()))

    def _ordinal_of(self, address: IPAddress) -> int:
        ordinal = self._ordinals.get(address)
        if ordinal is None:
            if len(self._ordinals) == self._publisher.capacity.services:
                self._publisher.refuse_service()
            ordinal = self._free_ordinals.pop() if self._free_ordinals else len(self._ordinals)  # else all are in use
            self._ordinals[address] = ordinal
        return ordinal

    def _give_back_ordinals(self) -> None:
        """Those of services that did not get into the table."""
        for address in self._ordinals.keys() - self._services.keys():
            self._free_ordinals.append(self._ordinals.pop(address))

    def _remove_host(self, address: IPAddress) -> None:
        self._publisher.remove_host(*layout.words(address))
        self.on_host(self._hosts.pop(address), None)
        del self._generations[address]

    def _remove_service(self, address: IPAddress) -> None:
        self._publisher.remove_service(*layout.words(address))
        del self._services[address]
        self._free_ordinals.append(self._ordinals.pop(address))


@contextmanager
def _recording(known: dict[IPAddress, Entry], put: Mapping[IPAddress, Entry]) -> Iterator[None]:
    """Enters what the body puts into a table, also if not all of it fits."""
    try:
        yield
    except TableFullError as error:
        known.update(islice(put.items(), error.placed))
        raise
    known.update(put)


def host_rows(hosts: Collection[Host], generations: Sequence[int]) -> Any:
    """Rows of ``layout.HOST``."""
    rows = np.zeros(len(hosts), dtype=layout.HOST)
    _set_words(rows, "address", [host.address for host in hosts])
    _set_words(rows, "node", [host.node for host in hosts])
    _set_words(rows, "instance", [host.instance_ip or NOWHERE for host in hosts])
    rows["generation"] = generations
    rows["port"] = [host.port for host in hosts]
    rows["flags"] = [layout.HOST_LOCAL if host.local else 0 for host in hosts]
    return rows


def node_rows(nodes: Collection[Node]) -> Any:
    """Rows of ``layout.NODE``."""
    rows = np.zeros(len(nodes), dtype=layout.NODE)
    _set_words(rows, "address", [node.address for node in nodes])
    rows["port"] = [node.port for node in nodes]
    rows["mtu"] = [node.mtu for node in nodes]
    rows["flags"] = [layout.NODE_OURS if node.ours else 0 for node in nodes]
    return rows


def service_rows(services: Collection[Service], ordinals: Sequence[int]) -> Any:
    """Rows of ``layout.SERVICE``, their choices counted and yet to be placed."""
    rows = np.zeros(len(services), dtype=layout.SERVICE)
    _set_words(rows, "address", [service.address for service in services])
    rows["ordinal"] = ordinals
    rows["policy"] = [POLICIES[service.policy] for service in services]
    rows["count"] = [len(choices(service)) for service in services]
    return rows


def choice_rows(services: Collection[Service]) -> Any:
    """Rows of ``layout.CHOICE``: the choices of all services, end to end."""
    backends = [address for service in services for address in choices(service)]
    rows = np.zeros(len(backends), dtype=layout.CHOICE)
    _set_words(rows, "address", backends)
    return rows


def choices(service: Service) -> Sequence[IPAddress]:
    """The choice list: each backend as often as its weight says, spread evenly (smooth weighted round robin)."""
    if not service.weights:
        return service.backends
    return [service.backends[i] for i in spread(service.weights)]


def _set_words(rows: Any, name: str, addresses: Iterable[IPAddress]) -> None:
    words = layout.words_of(addresses)
    rows[f"{name}_hi"], rows[f"{name}_lo"] = words[:, 0], words[:, 1]


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
