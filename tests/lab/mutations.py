"""Good packets from a container of another node, and what random changes make of them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.oracle.build import SYN, echo, error, extended, fragments, sctp, tcp, udp

MARK = b"a forged packet"
HEAD = 72
"""Bytes of a packet in which most changes happen: its headers."""


def good(source: str, target: str) -> list[bytes]:
    """One of each kind, with one mark each at its end."""
    v6 = ":" in source
    packets = [
        udp(source, target, 40_000, 9, MARK),
        udp(source, target, 40_000, 9, MARK, checksum=0) if not v6 else udp(source, target, 1, 2, MARK),
        tcp(source, target, 40_000, 9, MARK),
        tcp(source, target, 40_000, 9, MARK, flags=SYN, options=b"\2\4\5\xb4"),
        echo(source, target, 7, MARK),
        echo(source, target, 7, MARK, reply=True),
        sctp(source, target, 5, 6),
        error(source, target, *((1, 4) if v6 else (3, 3)), udp(target, source, 9, 40_000, MARK)),
        fragments(udp(source, target, 40_000, 9, bytes(16) + MARK), 8, ident=77)[1],
    ]
    if v6:
        packets += [
            extended(packets[0], (60, bytes(6))),
            extended(packets[0], (0, bytes(6)), (43, bytes([4, 0]) + bytes(4)), (60, bytes(14))),
        ]
    else:
        packets.append(udp(source, target, 40_000, 9, MARK, ip_options=b"\1" * 8))
    return packets


def mutant(random: Random, packet: bytes) -> bytes:
    """A packet with one to three changes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        packet = random.choice(CHANGES)(random, packet)
    return packet


def _flip(random: Random, packet: bytes) -> bytes:
    at = random.randrange(min(HEAD, len(packet))) if packet else 0
    return packet[:at] + bytes([packet[at] ^ 1 << random.randrange(8)]) + packet[at + 1 :] if packet else packet


def _set(random: Random, packet: bytes) -> bytes:
    at = random.randrange(min(HEAD, len(packet))) if packet else 0
    return packet[:at] + bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))]) + packet[at + 1 :]


def _cut(random: Random, packet: bytes) -> bytes:
    return packet[: random.randrange(len(packet) + 1)]


def _lengthen(random: Random, packet: bytes) -> bytes:
    return packet + random.randbytes(random.randrange(1, 40))


def _insert(random: Random, packet: bytes) -> bytes:
    at = random.randrange(min(HEAD, len(packet)) + 1)
    return packet[:at] + random.randbytes(random.randrange(1, 9)) + packet[at:]


def _leave_out(random: Random, packet: bytes) -> bytes:
    at = random.randrange(min(HEAD, len(packet)) + 1)
    return packet[:at] + packet[at + random.randrange(1, 9) :]


def _random(random: Random, packet: bytes) -> bytes:
    at = random.randrange(min(HEAD, len(packet)) + 1)
    size = random.randrange(1, 5)
    return packet[:at] + random.randbytes(size) + packet[at + size :]


CHANGES: tuple[Callable[[Random, bytes], bytes], ...] = (
    _flip,
    _flip,
    _set,
    _set,
    _cut,
    _lengthen,
    _insert,
    _leave_out,
    _random,
)
