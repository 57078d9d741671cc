"""The shape of a fixture: one sentence, and steps: what goes in, the verdict on it, what comes out.

A fixture is data. Its bytes are built by tests/oracle/build.py, field by field, every checksum computed from
the packet's own bytes; the paths under test only change checksums. The two must arrive at the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tests.oracle.model import Outcome, World
from tests.oracle.virtio import PLAIN
from tests.packets.world import NODE_B, WORLD

SENT = "sent"
DELIVERED = "delivered"
HELD = "held"  # until its address is known, or its datagram whole

Datagram = tuple[str, int, bytes]


@dataclass(frozen=True)
class Tun:
    """A read from the TUN: what a container sent."""

    packet: bytes
    vnet: bytes = PLAIN


@dataclass(frozen=True)
class Wire:
    """A read from the underlay: a datagram, or a train of them, `segment` bytes each but the last."""

    payload: bytes
    segment: int = 0
    source: tuple[str, int] = NODE_B


@dataclass(frozen=True)
class Learn:
    """The tables become those of this world."""

    world: World


@dataclass(frozen=True)
class Refuse:
    """The supervisor says that nobody has an address."""

    address: str


@dataclass(frozen=True)
class Later:
    """So many seconds pass."""

    seconds: float


Given = Tun | Wire | Learn | Refuse | Later


@dataclass(frozen=True)
class Step:
    """One input and what must come of it; `verdicts` has one entry a packet of a train, in order.

    `replies`: what the node itself says to the sender of a packet that was dropped.

    `writes`, where given, says how many packets each write into the TUN must stand for. A path that never
    merges is not asked.
    """

    given: Given
    verdicts: tuple[str, ...]
    wire: tuple[Datagram, ...] = ()
    tun: tuple[bytes, ...] = ()
    writes: tuple[int, ...] | None = None
    replies: tuple[bytes, ...] = ()

    @property
    def drops(self) -> dict[str, int]:
        """The verdicts that are reasons, counted."""
        return dict(Counter(verdict for verdict in self.verdicts if verdict not in (SENT, DELIVERED, HELD)))

    def outcome(self) -> Outcome:
        """What is expected, as an oracle would say it."""
        return Outcome(list(self.wire), [(PLAIN, packet) for packet in self.tun + self.replies], self.drops)


@dataclass(frozen=True)
class Fixture:
    """One behaviour: a sentence, the tables, and steps that run one after the other through the same path."""

    sentence: str
    steps: tuple[Step, ...]
    world: World = WORLD


def sent(given: Given, *datagrams: Datagram) -> Step:
    """The packet leaves for other nodes as these datagrams."""
    return Step(given, (SENT,), wire=datagrams)


def delivered(given: Given, *packets: bytes, writes: tuple[int, ...] | None = None) -> Step:
    """All that was given reaches containers of this node as these packets."""
    verdicts = (DELIVERED,) * len(packets) if isinstance(given, Wire) else (DELIVERED,)
    return Step(given, verdicts, tun=packets, writes=writes)


def dropped(given: Given, *reasons: str) -> Step:
    """Nothing leaves; the drops are counted under these reasons."""
    return Step(given, reasons)


def refused(given: Given, reason: str, *replies: bytes) -> Step:
    """Dropped, and the sender is told so; what waited is refused once for each reply."""
    verdicts = (reason,) if isinstance(given, Tun) else (reason,) * len(replies)
    return Step(given, verdicts, replies=replies)


def held(given: Tun | Wire) -> Step:
    """The packet waits until its address is known."""
    return Step(given, (HELD,))


def nothing(given: Given) -> Step:
    """Something that happens, of which nothing comes."""
    return Step(given, ())


def to(node: tuple[str, int], *packets: bytes) -> tuple[Datagram, ...]:
    """Datagrams for a node."""
    return tuple((*node, packet) for packet in packets)


def train(*packets: bytes) -> Wire:
    """Datagrams that the kernel's UDP_GRO hands over in one read: all of one size but a shorter last one."""
    segment = len(packets[0])
    assert all(len(packet) == segment for packet in packets[:-1]), "only the last datagram may be shorter"
    assert 0 < len(packets[-1]) <= segment, "only the last datagram may be shorter"
    return Wire(b"".join(packets), segment)


def both(make: Callable[[int], Fixture]) -> list[Fixture]:
    """A behaviour that is the same in both families, spelled once."""
    return [make(0), make(1)]
