"""Round-trip times to other nodes, and which node is nearest. No input or output.

Theory of operation
-------------------
*Owns* one record a node that hosts instances of ``closest`` services (``follow`` says which), and an order of the nodes
of each such service (a *group*). *Read and written* by one caller, the prober, who reports answers, sends what ``tick``
gives, and calls it when ``deadline`` says so. Times are seconds that never go back.

Each node is probed every ``INTERVAL`` seconds, give or take a quarter of it, with one datagram
(``dataplane.probe``) that repeats a random token. An answer counts if it comes from that node, repeats the token, and
comes within ``TIMEOUT``.

**Smoothing** is that of RFC 6298 with a weight of a quarter, as there is one sample a second and not one a round
trip. A probe that is lost counts as one that took twice the smoothed time; after ``LOSSES_MAX`` in a row the time is
unknown. A node that never answers, as an existing NetManager, stays unknown, comes after all that are known, by
address. ``SAMPLES_MIN`` answers make a node known.

**Hysteresis**: the first node of a group stays so until another one was nearer by ``MARGIN`` of its time and by
``MARGIN_S``, for ``HOLD`` seconds without a break; or until it becomes unknown. So a change of the network is followed
after some samples, and noise is not. The others are put in order when that happens, and when one of them becomes known
or unknown. Orders are looked at every ``LOOK`` seconds.

Limits: ``NODES_MAX`` nodes are probed, those of the lowest addresses; the others stay unknown.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Final

from appliance.dataplane.probe import answer_of, request
from appliance.tables.layout import IPAddress

INTERVAL: Final = 1.0
TIMEOUT: Final = 0.9
SMOOTHING: Final = 0.25
LOSSES_MAX: Final = 3
SAMPLES_MIN: Final = 2
MARGIN: Final = 0.2
MARGIN_S: Final = 0.000_3
HOLD: Final = 2.0
LOOK: Final = 0.25
GRAIN: Final = 0.02
"""Seconds between two ticks at least: a thousand nodes must not mean a thousand ticks a second."""
NODES_MAX: Final = 1_000

Node = tuple[IPAddress, int]
"""Underlay address and port."""
Group = frozenset[Node]


@dataclass(frozen=True)
class Probe:
    """A datagram to be sent to a node."""

    node: Node
    payload: bytes


@dataclass
class _Peer:
    next_at: float
    token: bytes = b""
    sent_at: float = 0.0
    smoothed: float = inf
    samples: int = 0
    losses: int = 0


@dataclass
class _Order:
    nodes: tuple[Node, ...]
    known: frozenset[Node] = frozenset()
    is_challenged: bool = False
    since: float = 0.0


@dataclass
class RoundTrips:
    """See the module."""

    chance: Callable[[], float] = random.random
    tokens: Callable[[], bytes] = field(default=lambda: secrets.token_bytes(8))
    _peers: dict[Node, _Peer] = field(default_factory=dict)
    _orders: dict[Group, _Order] = field(default_factory=dict)
    _ticked: float = -inf
    _looked: float = -inf

    def follow(self, groups: Iterable[Group], now: float) -> None:
        """These are the groups of nodes from now on; what is known of nodes that stay is kept."""
        wanted = set(groups)
        nodes = sorted({node for group in wanted for node in group}, key=_address)[:NODES_MAX]
        spread = INTERVAL / max(1, len(nodes))
        self._peers = {node: self._peers.get(node) or _Peer(now + spread * index) for index, node in enumerate(nodes)}
        self._orders = {group: self._orders.get(group) or _Order(self._sorted(group)) for group in wanted}

    def order(self, group: Group) -> tuple[Node, ...]:
        """The nodes of a group that is followed, nearest first."""
        return self._orders[group].nodes

    def deadline(self) -> float | None:
        """When ``tick`` is to be called; None if nothing is followed."""
        due = min((_due(peer) for peer in self._peers.values()), default=None)
        return None if due is None else max(due, self._ticked + GRAIN)

    def tick(self, now: float) -> tuple[list[Probe], bool]:
        """Probes that are due, and whether an order changed."""
        probes, self._ticked = [], now
        for node, peer in self._peers.items():
            if peer.token and now >= peer.sent_at + TIMEOUT:
                self._lost(peer)
            if now >= peer.next_at:
                peer.token, peer.sent_at = self.tokens(), now
                peer.next_at = now + INTERVAL * (0.75 + 0.5 * self.chance())
                probes.append(Probe(node, request(peer.token)))
        return probes, self._reorder(now)

    def received(self, source: Node, payload: bytes, now: float) -> None:
        """A datagram came. What is no answer to the open probe of its source is ignored."""
        peer = self._peers.get(source)
        if peer is None or not peer.token or answer_of(payload) != peer.token or now > peer.sent_at + TIMEOUT:
            return
        sample, peer.token = now - peer.sent_at, b""
        peer.losses = 0
        peer.samples += 1
        peer.smoothed = sample if peer.smoothed == inf else peer.smoothed + SMOOTHING * (sample - peer.smoothed)

    def times(self) -> Mapping[Node, float | None]:
        """Smoothed round-trip times in seconds, by node; None: unknown."""
        return {node: None if (time := _time(peer)) == inf else time for node, peer in self._peers.items()}

    @staticmethod
    def _lost(peer: _Peer) -> None:
        peer.token = b""
        peer.losses += 1
        peer.smoothed += SMOOTHING * peer.smoothed
        if peer.losses >= LOSSES_MAX:
            peer.smoothed, peer.samples = inf, 0

    def _reorder(self, now: float) -> bool:
        """Look at the order of each group; whether any changed."""
        if now < self._looked + LOOK:
            return False
        self._looked = now
        changed = [self._look(group, order, now) for group, order in self._orders.items()]
        return any(changed)

    def _look(self, group: Group, order: _Order, now: float) -> bool:
        before, known = order.nodes, frozenset(node for node in group if self._time(node) < inf)
        if self._is_replaced(order, min(group, key=self._rank), now):
            order.nodes, order.is_challenged = self._sorted(group), False
        elif known != order.known:
            first = order.nodes[0]
            order.nodes = (first, *(node for node in self._sorted(group) if node != first))
        order.known = known
        return order.nodes != before

    def _is_replaced(self, order: _Order, best: Node, now: float) -> bool:
        """Whether the first node gives way. Who is nearer may change while it is challenged."""
        first = order.nodes[0]
        if best == first or not self._is_nearer(best, first):
            order.is_challenged = False
            return False
        if not order.is_challenged:
            order.is_challenged, order.since = True, now
        return self._time(first) == inf or now - order.since >= HOLD

    def _is_nearer(self, node: Node, first: Node) -> bool:
        mine, theirs = self._time(node), self._time(first)
        return mine < theirs if theirs == inf else mine < theirs - max(MARGIN * theirs, MARGIN_S)

    def _sorted(self, group: Group) -> tuple[Node, ...]:
        return tuple(sorted(group, key=self._rank))

    def _rank(self, node: Node) -> tuple[float, tuple[int, bytes, int]]:
        return self._time(node), _address(node)

    def _time(self, node: Node) -> float:
        peer = self._peers.get(node)
        return inf if peer is None else _time(peer)


def _time(peer: _Peer) -> float:
    return peer.smoothed if peer.samples >= SAMPLES_MIN else inf


def _due(peer: _Peer) -> float:
    return min(peer.next_at, peer.sent_at + TIMEOUT) if peer.token else peer.next_at


def _address(node: Node) -> tuple[int, bytes, int]:
    return node[0].version, node[0].packed, node[1]
