"""Fragments put together (RFC 791 section 3.2, RFC 8200 section 4.5), and datagrams cut into fragments again.

A Collector keeps the pieces of unfinished datagrams. Pieces that overlap, or disagree about the end, spoil their
datagram, and what comes of it later is dropped too (RFC 5722); the very same piece once more does no harm.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.oracle import model
from tests.oracle.build import fragment
from tests.oracle.checksum import checksum
from tests.oracle.model import Address
from tests.oracle.packet import FRAGMENT, WHOLE, DropError, Packet, read, require

SECOND = 1_000_000_000
PATIENCE = 2 * SECOND
DATAGRAMS = 32  # unfinished ones at a time, a quarter of them of one sender
PIECES = 64  # of one datagram
REPEATED = 120  # bytes of header that every piece repeats


class Key(NamedTuple):
    """What the pieces of one datagram have in common; `way` is the side that they come from."""

    way: str
    source: Address
    destination: Address
    identification: int
    protocol: int


class Pieces(NamedTuple):
    """How a datagram came: the size of its largest piece, the header that all repeat, their identification."""

    largest: int
    repeated: int
    identification: int


@dataclass
class Datagram:
    """The pieces of one datagram so far."""

    deadline: int
    pieces: list[Packet] = field(default_factory=list)
    end: int | None = None
    spoiled: bool = False

    def add(self, piece: Packet) -> None:
        """Take a piece, or spoil the datagram with it."""
        require(not self.spoiled, model.FRAGMENT)
        if any(span(piece) == span(other) for other in self.pieces):
            return
        if not self._fits(piece):
            self.spoiled = True
            raise DropError(model.FRAGMENT, len(self.pieces) + 1)
        self.pieces.append(piece)
        if not piece.more:
            self.end = span(piece)[1]

    def _fits(self, piece: Packet) -> bool:
        begin, end = span(piece)
        others = [span(other) for other in self.pieces]
        apart = all(end <= other_begin or other_end <= begin for other_begin, other_end in others)
        within = self.end is None or (end <= self.end and piece.more)
        is_last = piece.more or all(other_end <= end for _, other_end in others)
        return apart and within and is_last and len(others) < PIECES and repeated(piece) <= REPEATED

    @property
    def is_whole(self) -> bool:
        return self.end == sum(end - begin for begin, end in map(span, self.pieces))

    def whole(self) -> tuple[Packet, Pieces]:
        """The datagram, and how it came; DropError if it is no good."""
        in_order = sorted(self.pieces, key=span)
        first = in_order[0]
        start = repeated(first)
        data = bytearray(first.data[:start] + b"".join(piece.data[piece.l4 :] for piece in in_order))
        _restore_header(data, first)
        packet = read(bytes(data))
        require(packet.kind == WHOLE, model.MALFORMED)
        return packet, Pieces(max(len(piece.data) for piece in in_order), start, first.identification)


def span(piece: Packet) -> tuple[int, int]:
    """Where a piece's data begins and ends in the datagram's."""
    return piece.offset, piece.offset + len(piece.data) - piece.l4


def repeated(piece: Packet) -> int:
    """Bytes of the header that each piece repeats: without IPv6's fragment header."""
    return piece.l4 if piece.version == 4 else piece.l4 - 8


def _restore_header(data: bytearray, first: Packet) -> None:
    """Make the first piece's header that of the datagram."""
    if first.version == 6:
        struct.pack_into("!H", data, 4, len(data) - 40)
        data[first.named_at] = first.protocol
        return
    struct.pack_into("!H", data, 2, len(data))
    struct.pack_into("!H", data, 6, first.u16(6) & 0xC000)
    data[10:12] = b"\0\0"
    struct.pack_into("!H", data, 10, checksum(bytes(data[: first.l4])))


class Collector:
    """The unfinished datagrams of a worker."""

    def __init__(self) -> None:
        self._open: dict[Key, Datagram] = {}

    def add(self, way: str, piece: Packet, now: int) -> tuple[Packet, Pieces] | None:
        """Take a piece; gives the datagram that it makes whole. DropError if the piece, or the whole, is no good."""
        assert piece.kind == FRAGMENT
        require(piece.header_valid, model.MALFORMED)
        key = Key(way, piece.source, piece.destination, piece.identification, piece.protocol)
        if key not in self._open:
            of_sender = sum(other.source == piece.source for other in self._open)
            require(len(self._open) < DATAGRAMS and of_sender < DATAGRAMS // 4, model.FRAGMENT)
            self._open[key] = Datagram(now + PATIENCE)
        self._open[key].add(piece)
        return self._open.pop(key).whole() if self._open[key].is_whole else None

    def expire(self, now: int) -> int:
        """Forget what is overdue; gives how many pieces that were."""
        late = [key for key, datagram in self._open.items() if datagram.deadline <= now]
        gone = [self._open.pop(key) for key in late]
        return sum(len(datagram.pieces) for datagram in gone if not datagram.spoiled)


def cut(packet: Packet, came: Pieces) -> list[bytes]:
    """The datagram in pieces as large as those that it came in, but not larger."""
    start, data = came.repeated, packet.data
    header = start if packet.version == 4 else start + 8
    step = (came.largest - header) // 8 * 8
    return [
        fragment(data, start, at, min(at + step, len(data)), came.identification, more=at + step < len(data))
        for at in range(start, len(data), step)
    ]
