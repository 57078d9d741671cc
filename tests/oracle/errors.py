"""ICMP errors with another packet quoted: the quote gets the addresses that the receiver knows (RFC 5508 section 4).

The checksums inside the quote change by what the addresses change, as far as the quote reaches; the error's own is
computed anew.
"""

from __future__ import annotations

import struct

from tests.oracle.build import ICMP, UDP, error
from tests.oracle.checksum import updated
from tests.oracle.model import Address
from tests.oracle.packet import CHECKSUM_OFFSET, Packet, Quoted


def readdressed(packet: Packet, source: Address, destination: Address, quote: bytes) -> bytes:
    """The error between other ends, about another packet; its IP header is otherwise as it was."""
    kind, code, _, rest = struct.unpack_from("!BBHI", packet.data, packet.l4)
    fresh = error(str(source), str(destination), kind, code, quote, rest)
    body = fresh[20 if packet.version == 4 else 40 :]
    head = bytearray(packet.data[: packet.l4])
    old, new = packet.source.packed + packet.destination.packed, source.packed + destination.packed
    at = 12 if packet.version == 4 else 8
    head[at : at + len(new)] = new
    if packet.version == 4 and old != new:
        struct.pack_into("!H", head, 10, updated(packet.u16(10), old, new))
    return bytes(head) + body


def requoted(quoted: Quoted, source: Address, destination: Address) -> bytes:
    """The quote as if the packet had been sent between these."""
    old, new = quoted.source.packed + quoted.destination.packed, source.packed + destination.packed
    data = bytearray(quoted.data)
    if old == new:
        return bytes(data)
    at = 12 if quoted.version == 4 else 8
    data[at : at + len(new)] = new
    fields = [10] if quoted.version == 4 else []
    if quoted.protocol in CHECKSUM_OFFSET and quoted.protocol != ICMP:
        fields.append(quoted.l4 + CHECKSUM_OFFSET[quoted.protocol])
    for place in fields:
        _update(data, place, old, new, is_udp=quoted.protocol == UDP and place != 10)
    return bytes(data)


def _update(data: bytearray, at: int, old: bytes, new: bytes, is_udp: bool) -> None:
    """Change a checksum field that is in the quote; UDP's 0 means that there is none."""
    if at + 2 > len(data):
        return
    now = int.from_bytes(data[at : at + 2], "big")
    if is_udp and now == 0:
        return
    field = updated(now, old, new)
    struct.pack_into("!H", data, at, 0xFFFF if is_udp and field == 0 else field)
