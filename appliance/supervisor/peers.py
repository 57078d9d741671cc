"""The nodes that packets may come from and go to, and how large a packet each of them can be sent.

Theory of operation
-------------------
A node is known by the hosts that the tables have on it, and by the cluster's list of nodes, which says of each whether
it runs this appliance (``ours``). ``PeerSet`` holds both and decides; it is pure, and counts references: one host or
node that changes costs that one, however many there are. ``Peers`` is its executor: it writes the node table, and asks
the kernel for the MTU of the path to each node. It runs in the supervisor's event loop; only the questions are in a
thread.

The node table is by address. Several nodes behind one address (NAT) have several ports: the lowest counts, so that
every node decides alike, whatever it heard of first. This node itself is none of its peers.

**Path MTU.** What the kernel knows, of the link, the route and what routers told it (RFC 1191, RFC 8201); nothing is
sent. It is asked for when a node enters (until then it is 0, unknown), for all nodes when routes or links change
(``recheck``) and every ``RECHECK_S`` seconds, since what routers told expires (net.ipv4.route.mtu_expires, 600 s), and
at once when a worker found a packet too big (``too_big``). Rounds of at most ``BATCH`` nodes are ``PAUSE_S`` apart, so
neither a flood of reports nor a flapping link costs more than that; the first round never waits.

If the node table is full, the error is counted and logged, and what did not fit is tried again with each round.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from appliance.cluster.messages import ClusterNode
from appliance.cluster.requests import Endpoint
from appliance.supervisor.sockets import IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO
from appliance.tables.catalogue import Catalogue, Host, Node
from appliance.tables.layout import IPAddress
from appliance.tables.publish import TableFullError
from appliance.tasks import end

log = logging.getLogger(__name__)

BATCH: Final = 512
"""Nodes asked for at once: some 10 ms in a thread."""
PAUSE_S: Final = 0.05
RECHECK_S: Final = 120.0
OURS: Final = 2
"""From this ``overlay`` on a node translates instance IPs that arrive as destinations."""
IP_MTU, IPV6_MTU = 14, 24  # ip(7), ipv6(7); the socket module has neither
_ANY_PORT = 9


@dataclass
class _Known:
    """All that is known of an address: how many hosts or other nodes, and how many nodes of ours, are at each port."""

    hosts: dict[int, int] = field(default_factory=dict)
    ours: dict[int, int] = field(default_factory=dict)


class PeerSet:
    """See the module. Changes collect until ``take``."""

    def __init__(self, here: Endpoint) -> None:
        self._here = here
        self._known: dict[IPAddress, _Known] = {}
        self._nodes: dict[str, tuple[Endpoint, bool]] = {}
        self._mtus: dict[IPAddress, int] = {}
        self._changed: set[IPAddress] = set()

    def __iter__(self) -> Any:
        """Addresses of all peers."""
        return (address for address in self._known if self._node(address) is not None)

    def move(self, here: Endpoint) -> None:
        """Other nodes reach this one elsewhere from now on."""
        self._changed |= {self._here.address, here.address}
        self._here = here

    def host(self, before: Host | None, after: Host | None) -> None:
        """The tables have another entry for a host; None: no entry."""
        if before is not None and after is not None and (before.node, before.port) == (after.node, after.port):
            return
        if after is not None:
            self._count(after.node, after.port, 1, is_ours=False)
        if before is not None:
            self._count(before.node, before.port, -1, is_ours=False)

    def node(self, name: str, after: Endpoint | None, *, is_ours: bool = True) -> None:
        """A node of the cluster is there; None: no more."""
        before = self._nodes.pop(name, None)
        if after is not None:
            self._nodes[name] = (after, is_ours)
            self._count(after.address, after.port, 1, is_ours=is_ours)
        if before is not None:
            endpoint, was_ours = before
            self._count(endpoint.address, endpoint.port, -1, is_ours=was_ours)

    def names(self) -> Iterable[str]:
        """The cluster's nodes."""
        return self._nodes.keys()

    def measured(self, mtus: Mapping[IPAddress, int]) -> None:
        """MTUs of the paths to some nodes, in bytes, 0 if unknown."""
        for address, mtu in mtus.items():
            if address in self._known and self._mtus.get(address) != mtu:
                self._mtus[address] = mtu
                self._changed.add(address)

    def is_measured(self, address: IPAddress) -> bool:
        """Whether a path was ever asked for."""
        return address in self._mtus

    def take(self) -> dict[IPAddress, Node | None]:
        """Addresses whose entry may be another one than at the last time, with that entry."""
        changed, self._changed = self._changed, set()
        return {address: self._node(address) for address in changed}

    def put_back(self, addresses: Iterable[IPAddress]) -> None:
        """What was taken could not be used: it comes again."""
        self._changed.update(addresses)

    def _node(self, address: IPAddress) -> Node | None:
        known = self._known.get(address)
        if known is None:
            return None
        here = self._here.port if address == self._here.address else 0
        port = min((port for port in known.hosts.keys() | known.ours.keys() if port != here), default=None)
        return None if port is None else Node(address, port, self._mtus.get(address, 0), port in known.ours)

    def _count(self, address: IPAddress, port: int, by: int, *, is_ours: bool) -> None:
        known = self._known.setdefault(address, _Known())
        ports = known.ours if is_ours else known.hosts
        count = ports.get(port, 0) + by
        if count:
            ports[port] = count
        else:
            del ports[port]
        if not known.hosts and not known.ours:
            del self._known[address]
            self._mtus.pop(address, None)
        if count == 0 or count == by:  # a port came or went
            self._changed.add(address)


def path_mtu(address: IPAddress) -> int:
    """Bytes of the largest IP packet that the kernel would send to an address now, 0 if there is no way to it.

    A socket of its own each time (14 µs): one that is connected again keeps its first source address, by which the
    kernel would then choose the route (net/ipv4/datagram.c).
    """
    v4 = address.version == 4
    level, discover, mtu = (
        (socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_MTU) if v4 else (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_MTU)
    )
    with socket.socket(socket.AF_INET if v4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(level, discover, PMTUDISC_DO)
            sock.connect((str(address), _ANY_PORT))  # sends nothing
            return sock.getsockopt(level, mtu)
        except OSError:
            return 0


def path_mtus(addresses: Iterable[IPAddress]) -> dict[IPAddress, int]:
    """``path_mtu`` of each."""
    return {address: path_mtu(address) for address in addresses}


class Peers:
    """See the module. Takes the catalogue's ``on_host``; to be made before its first entry."""

    def __init__(
        self,
        catalogue: Catalogue,
        here: Endpoint,
        measure: Callable[[Iterable[IPAddress]], dict[IPAddress, int]] = path_mtus,
    ) -> None:
        self.failures = 0
        self._catalogue = catalogue
        self._measure = measure
        self._set = PeerSet(here)
        self._due: dict[IPAddress, None] = {}  # a set in order
        self._some = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._recheck: asyncio.TimerHandle | None = None
        catalogue.on_host = self._host

    async def start(self) -> None:
        """Every node that is known now is in the table when this returns, with the MTU of its path."""
        await self._round()
        while self._due:
            await self._round()
        self._task = asyncio.create_task(self._run(), name="peers")
        self._schedule_recheck()

    async def stop(self) -> None:
        """End. The table stays as it is."""
        if self._recheck is not None:
            self._recheck.cancel()
        if self._task is not None:
            await end({self._task})

    def update(self, nodes: Mapping[str, ClusterNode], changed: Iterable[str]) -> None:
        """The cluster's list, of which some changed, or are gone."""
        for name in changed:
            node = nodes.get(name)
            ours = node is not None and node.overlay >= OURS
            self._set.node(name, Endpoint(node.address, node.port) if node else None, is_ours=ours)
        self._some.set()

    def forget_cluster(self) -> None:
        """The node is a member no more."""
        self.update({}, list(self._set.names()))

    def move(self, here: Endpoint) -> None:
        """Other nodes reach this one elsewhere from now on."""
        self._set.move(here)
        self._some.set()

    def recheck(self) -> None:
        """Routes or links changed: any path may have another MTU."""
        self._due.update(dict.fromkeys(self._set))
        self._some.set()

    def too_big(self, address: IPAddress) -> None:
        """A worker found the path to a node narrower than the table says."""
        self._due[address] = None
        self._some.set()

    def status(self) -> dict[str, int]:
        """What operators see."""
        nodes = self._catalogue.nodes.values()
        return {
            "nodes": len(nodes),
            "ours": sum(node.ours for node in nodes),
            "unknown_path_mtu": sum(node.mtu == 0 for node in nodes),
            "smallest_path_mtu": min((node.mtu for node in nodes if node.mtu), default=0),
            "tables_refused": self.failures,
        }

    def _host(self, before: Host | None, after: Host | None) -> None:
        self._set.host(before, after)
        self._some.set()

    def _schedule_recheck(self) -> None:
        self._recheck = asyncio.get_running_loop().call_later(RECHECK_S, self._periodic)

    def _periodic(self) -> None:
        self.recheck()
        self._schedule_recheck()

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            try:
                await self._round()
            except Exception:  # one round's mistake must not end all that follow
                self.failures += 1
                log.exception("peers not updated")
            await asyncio.sleep(PAUSE_S)
            if self._due:
                self._some.set()

    async def _round(self) -> None:
        """Put what changed into the table, ask for some paths, and put in what that told."""
        self._publish()
        batch = [address for address, _ in zip(self._due, range(BATCH), strict=False)]
        if batch:
            for address in batch:  # before it is asked for: what is reported meanwhile asks again
                del self._due[address]
            self._set.measured(await asyncio.to_thread(self._measure, batch))
            self._publish()

    def _publish(self) -> None:
        changed = self._set.take()
        put = [node for node in changed.values() if node is not None]
        self._due.update(dict.fromkeys(it.address for it in put if not self._set.is_measured(it.address)))
        try:
            self._catalogue.update_nodes(changed)
        except TableFullError as error:
            self.failures += 1
            self._set.put_back(changed)
            log.error("nodes refused, what fits is in force", extra={"error": str(error)})
