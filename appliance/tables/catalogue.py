"""What the tables should hold, as Python values, and the changes that bring them there.

Owned by the supervisor. ``update`` compares the wanted entries of some addresses with those in force and publishes the
difference as one epoch; what did not change is not touched, so a notice about one instance costs one entry, however
large the tables are. ``replace`` does so for all addresses.

A host's *generation* is the identity of the instance behind an address: it changes when the address gets another
instance, and not when the instance's node gets another underlay address. Flows carry it.
A ServiceIP's generation changes when a backend leaves its choice list, and not when the list grows or its order
changes: it tells UDP flows to look whether they may stay.

What a writer that is gone left in the tables (``legacy``) stays in force until it is confirmed or ``disinherit`` is
called: an entry that is wanted as it is there is not written again, and keeps its generation and its ordinal, so the
flows to it notice nothing.

On a full table the change stops at the row that did not fit; ``update`` raises, and whoever calls it with the same
addresses again tries the rest again.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np

from appliance import limits
from appliance.tables import layout, maglev
from appliance.tables.layout import IPAddress
from appliance.tables.legacy import Legacy
from appliance.tables.publish import Publisher, TableFullError

NODES_AT_ONCE = 64
"""Nodes that a full table refuses together."""

OWNER_MASK = 0x3FFF
"""Bits of an owner's digest that a host's flags have room for."""

NOWHERE = IPv6Address(0)
"""In place of an instance IP that there is not: both words zero."""
Entry = TypeVar("Entry")
Choices = list[tuple[IPAddress, int]]
"""Backends and weights, in the order of the table."""
POLICIES = {
    "rr": layout.POLICY_RR,
    "instance": layout.POLICY_INSTANCE,
    "closest": layout.POLICY_CLOSEST,
    "least-flows": layout.POLICY_LEAST_FLOWS,
    "maglev": layout.POLICY_MAGLEV,
}


@dataclass(frozen=True)
class Host:
    """A container on the overlay. ``owner`` names the instance (``job.number``). ``down``: no flow may stay with it."""

    address: IPAddress
    node: IPAddress
    port: int
    instance_ip: IPAddress | None = None
    local: bool = False
    owner: str = ""
    down: bool = False


@dataclass(frozen=True)
class Service:
    """A ServiceIP: which policy chooses among which namespace addresses, with which weights (default: all 1).

    Weight 0 drains: no new flow, UDP moves at once, TCP stays. ``near`` is for ``closest``: how many of the backends,
    from the first on, are to be chosen among; the others follow in the order in which they stand in for them.
    ``sticky``: seconds for which a client keeps its instance. ``hash_port`` is for ``maglev``: a client is an address
    and port.
    """

    address: IPAddress
    policy: str
    backends: tuple[IPAddress, ...]
    weights: tuple[int, ...] = ()
    name: str = ""
    near: int = 0
    sticky: int = 0
    hash_port: bool = False

    def weighted(self) -> Choices:
        """The backends that may be given to new flows, with their weights."""
        if not self.weights:
            return [(backend, 1) for backend in self.backends]
        return [(backend, weight) for backend, weight in zip(self.backends, self.weights, strict=True) if weight > 0]


class Ordinals:
    """Numbers below a capacity, one a key, for as long as the key is there."""

    def __init__(self, capacity: int, taken: Mapping[IPAddress, int]) -> None:
        self._capacity = capacity
        self._of = dict(taken)
        self._next = max(taken.values(), default=-1) + 1
        self._free = sorted(set(range(self._next)) - set(taken.values()))

    def take(self, key: IPAddress) -> int | None:
        """The key's number, from now on if it has none yet; None if there is none left."""
        number = self._of.get(key)
        if number is not None:
            return number
        if self._free:
            number = self._free.pop()
        elif self._next < self._capacity:
            number, self._next = self._next, self._next + 1
        else:
            return None
        self._of[key] = number
        return number

    @contextmanager
    def lent(self, keys: Collection[IPAddress], kept: Container[IPAddress]) -> Iterator[list[int | None]]:
        """The numbers of some keys; if the block fails, those of keys that are not kept are taken back."""
        try:
            yield [self.take(key) for key in keys]
        except TableFullError:
            for key in keys:
                if key in self._of and key not in kept:
                    self.give(key)
            raise

    def give(self, key: IPAddress) -> None:
        """Take the key's number back."""
        self._free.append(self._of.pop(key))


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
        self._offers: dict[IPAddress, int] = {}
        self.legacy = Legacy(publisher.inherited)
        self._host_ordinals = Ordinals(publisher.capacity.hosts, self.legacy.hosts.numbers("ordinal"))
        self._service_ordinals = Ordinals(publisher.capacity.services, self.legacy.services.numbers("ordinal"))
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
        rows = node_rows(nodes)
        self.legacy.nodes.carry_over("mtu", [node.address for node in nodes], rows)  # until it is measured again
        try:
            self._publisher.put_nodes(rows)
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
            if not no_services and not no_hosts:
                raise
            self._remove(no_services, no_hosts)  # what is to go must not stand in the way of what is to come
            self._publisher.publish()
            self._put(put_hosts, put_services)
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
                with self._host_ordinals.lent(hosts, self._hosts) as ordinals:
                    # Who got no number comes last, and has no room in the table either.
                    numbers = [ordinal or 0 for ordinal in ordinals]
                    rows = host_rows(hosts.values(), generations, numbers)
                    there = self.legacy.hosts.confirm(hosts, rows)
                    self._hosts.update((address, hosts[address]) for address in there)
                    new = {address: host for address, host in hosts.items() if address not in there}
                    with _recording(self._hosts, new):
                        is_new = [address not in there for address in hosts] if there else slice(None)
                        self._publisher.put_hosts(rows[is_new])
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
        if known is None and (row := self.legacy.hosts.row(host.address)) is not None and is_instance(row, host):
            self._generations[host.address] = int(row["generation"])
        elif known is None or _identity(known) != _identity(host):
            self._generations[host.address] = self._publisher.new_generation()
        return self._generations[host.address]

    def _put_services(self, services: Mapping[IPAddress, Service]) -> None:
        if services:
            with self._service_ordinals.lent(services, self._services) as ordinals:
                if None in ordinals:
                    self._publisher.refuse_service()
                lists = [choices(it) for it in services.values()]
                offers = [self._offer_of(it) for it in services.values()]
                rows = service_rows(services.values(), lists, ordinals, offers)
                places = choice_rows(lists)
                there = self.legacy.confirm_services(services, rows, places)
                self._services.update((address, services[address]) for address in there)
                new = {address: service for address, service in services.items() if address not in there}
                is_new = np.array([address not in there for address in services])
                tables = [slots_of(service) for service in new.values()]
                with _recording(self._services, new):
                    self._publisher.put_services(rows[is_new], places[np.repeat(is_new, rows["count"])], tables)

    def _offer_of(self, service: Service) -> int:
        """A ServiceIP's generation: another one if it is new, or gives a backend to nobody any more."""
        known = self._services.get(service.address)
        before = None if known is None else {backend for backend, _ in known.weighted()}
        if known is None and (offered := self.legacy.offered(service.address)) is not None:
            self._offers[service.address], before = offered
        if before is None or not before <= {backend for backend, _ in service.weighted()}:
            self._offers[service.address] = self._publisher.new_generation()
        return self._offers[service.address]

    def disinherit(self) -> int:
        """Take out what an earlier writer left and nobody has confirmed; how many entries that were."""
        hosts, services, nodes = self.legacy.forget()
        for address in services - self._services.keys():
            self._publisher.remove_service(*layout.words(address))
            self._service_ordinals.give(address)
        for address in hosts - self._hosts.keys():
            self._publisher.remove_host(*layout.words(address))
            self._host_ordinals.give(address)
        for address in nodes - self._nodes.keys():
            self._publisher.remove_node(*layout.words(address))
        self._publisher.publish()
        return len(services - self._services.keys()) + len(hosts - self._hosts.keys())

    def _remove_host(self, address: IPAddress) -> None:
        self._publisher.remove_host(*layout.words(address))
        self.on_host(self._hosts.pop(address), None)
        del self._generations[address]
        self._host_ordinals.give(address)

    def _remove_service(self, address: IPAddress) -> None:
        self._publisher.remove_service(*layout.words(address))
        del self._services[address], self._offers[address]
        self._service_ordinals.give(address)


@contextmanager
def _recording(known: dict[IPAddress, Entry], put: Mapping[IPAddress, Entry]) -> Iterator[None]:
    """Enters what the body puts into a table, also if not all of it fits."""
    try:
        yield
    except TableFullError as error:
        known.update(islice(put.items(), error.placed))
        raise
    known.update(put)


def _identity(host: Host) -> tuple[object, ...]:
    """What makes the instance behind an address another one, for the flows to it."""
    return host.owner, host.instance_ip, host.down


def is_instance(row: Any, host: Host) -> bool:
    """Whether a row of the tables is about the same instance as a host."""
    hi, lo = layout.words(host.instance_ip or NOWHERE)
    return bool(row["instance_hi"] == hi and row["instance_lo"] == lo and row["flags"] >> 1 == _flags(host) >> 1)


def _flags(host: Host) -> int:
    owner = zlib.crc32(host.owner.encode()) & OWNER_MASK
    return layout.HOST_LOCAL * host.local + layout.HOST_DOWN * host.down + layout.HOST_OWNER * owner


def host_rows(hosts: Collection[Host], generations: Sequence[int], ordinals: Sequence[int]) -> Any:
    """Rows of ``layout.HOST``."""
    rows = np.zeros(len(hosts), dtype=layout.HOST)
    _set_words(rows, "address", [host.address for host in hosts])
    _set_words(rows, "node", [host.node for host in hosts])
    _set_words(rows, "instance", [host.instance_ip or NOWHERE for host in hosts])
    rows["generation"], rows["ordinal"] = generations, ordinals
    rows["port"] = [host.port for host in hosts]
    rows["flags"] = [_flags(host) for host in hosts]
    return rows


def node_rows(nodes: Collection[Node]) -> Any:
    """Rows of ``layout.NODE``."""
    rows = np.zeros(len(nodes), dtype=layout.NODE)
    _set_words(rows, "address", [node.address for node in nodes])
    rows["port"] = [node.port for node in nodes]
    rows["mtu"] = [node.mtu for node in nodes]
    rows["flags"] = [layout.NODE_OURS if node.ours else 0 for node in nodes]
    return rows


def service_rows(
    services: Collection[Service], lists: Sequence[Choices], ordinals: Sequence[int | None], offers: Sequence[int]
) -> Any:
    """Rows of ``layout.SERVICE`` with their choice lists counted; these and tables are yet to be placed."""
    rows = np.zeros(len(services), dtype=layout.SERVICE)
    _set_words(rows, "address", [service.address for service in services])
    rows["ordinal"], rows["generation"] = ordinals, offers
    rows["policy"] = [POLICIES[service.policy] for service in services]
    rows["flags"] = [layout.SERVICE_HASH_PORT if service.hash_port else 0 for service in services]
    rows["count"] = [len(it) for it in lists]
    rows["near"] = [near_places(service, it) for service, it in zip(services, lists, strict=True)]
    rows["sticky"] = [service.sticky for service in services]
    return rows


def choice_rows(lists: Iterable[Choices]) -> Any:
    """Rows of ``layout.CHOICE``: choice lists, end to end."""
    places = list(chain.from_iterable(lists))
    rows = np.zeros(len(places), dtype=layout.CHOICE)
    _set_words(rows, "address", [address for address, _ in places])
    rows["weight"] = [weight for _, weight in places]
    return rows


def near_places(service: Service, choice_list: Choices) -> int:
    """How many places of the choice list are chosen among."""
    near = _near(service) if service.policy == "closest" else []
    return len(_repeated(near)) if near else len(choice_list)


def slots_of(service: Service) -> Any:
    """The maglev table of a ServiceIP over its choice list; None if it needs none."""
    weighted = choices(service) if service.policy == "maglev" else []
    return maglev.slots([it for it, _ in weighted], [weight for _, weight in weighted]) if weighted else None


def choices(service: Service) -> Choices:
    """The choice list: backends and weights. For ``maglev`` each backend once; for ``closest`` the near ones by weight,
    then the others once; else each as often as its weight says, spread evenly (smooth weighted round robin)."""
    if service.policy == "maglev":
        weights: Counter[IPAddress] = Counter()
        for backend, weight in service.weighted():
            weights[backend] += weight
        return sorted(weights.items(), key=lambda it: it[0].packed)[: limits.CHOICES_MAX]
    if service.policy == "closest" and (near := _near(service)):
        known = {backend for backend, _ in near}
        return _repeated(near) + [it for it in service.weighted() if it[0] not in known]
    return _repeated(service.weighted()) if service.weights else service.weighted()


def _near(service: Service) -> Choices:
    near = set(service.backends[: service.near])
    return [it for it in service.weighted() if it[0] in near]


def _repeated(weighted: Choices) -> Choices:
    if all(weight == 1 for _, weight in weighted):
        return weighted
    return [weighted[i] for i in spread(weight for _, weight in weighted)]


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
