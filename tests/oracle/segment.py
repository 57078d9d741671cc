"""Super-packets cut into the packets they stand for, and checksums that were left to a device finished.

What the kernel's inet_gso_segment, tcp_gso_segment and __udp_gso_segment do, in their simplest form.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from tests.oracle.build import CWR, FIN, PSH, TCP, UDP
from tests.oracle.checksum import checksum, updated
from tests.oracle.packet import CHECKSUM_OFFSET, Packet


def cut(packet: Packet, size: int) -> list[bytes]:
    """The packets of a TCP or UDP super-packet with at most `size` bytes of payload each.

    All checksums are valid. IPv4 ids count up from the first, TCP sequence numbers by the payload; FIN and
    PSH stay on the last packet only, CWR on the first only (RFC 3168 §6.1.2); everything else is repeated.
    """
    payload = packet.payload
    starts = range(0, max(len(payload), 1), size)
    return [_piece(packet, index, start, min(start + size, len(payload))) for index, start in enumerate(starts)]


def _piece(packet: Packet, index: int, start: int, end: int) -> bytes:
    first, last = start == 0, end == len(packet.payload)
    data = bytearray(packet.data[: packet.payload_at] + packet.payload[start:end])
    _set_lengths(data, packet, index)
    if packet.protocol == TCP:
        struct.pack_into("!I", data, packet.l4 + 4, (packet.u32(packet.l4 + 4) + start) % 2**32)
        data[packet.l4 + 13] &= 0xFF & ~((0 if first else CWR) | (0 if last else FIN | PSH))
    return _with_valid_checksums(data, packet)


def _set_lengths(data: bytearray, packet: Packet, index: int) -> None:
    if packet.version == 4:
        struct.pack_into("!HH", data, 2, len(data), (packet.u16(4) + index) % 2**16)
    else:
        struct.pack_into("!H", data, 4, len(data) - 40)
    if packet.protocol == UDP:
        struct.pack_into("!H", data, packet.l4 + 4, len(data) - packet.l4)


def _with_valid_checksums(data: bytearray, packet: Packet) -> bytes:
    at = packet.l4 + CHECKSUM_OFFSET[packet.protocol]
    data[at : at + 2] = b"\0\0"
    pseudo = Packet(bytes(data), packet.l4, packet.protocol).pseudo_sum
    field = checksum(bytes(data[packet.l4 :]), pseudo)
    struct.pack_into("!H", data, at, 0xFFFF if packet.protocol == UDP and field == 0 else field)
    if packet.version == 4:
        data[10:12] = b"\0\0"
        struct.pack_into("!H", data, 10, checksum(bytes(data[: packet.l4])))
    return bytes(data)


def finish(data: bytes, start: int, offset: int) -> bytes:
    """Data with the checksum from `start` to its end written at start + offset (virtio 1.2 §5.1.6.2).

    The field already holds what the sum begins with. Zero is written as 0xffff, as the kernel's
    skb_checksum_help does: to every protocol but UDP it is the same number.
    """
    field = checksum(data[start:]) or 0xFFFF
    at = start + offset
    return data[:at] + struct.pack("!H", field) + data[at + 2 :]


def clamped(packet: Packet, most: int, partial: bool) -> Packet:
    """A TCP opening whose maximum segment size (RFC 9293 section 3.2) is at most this; `partial`: no checksum yet."""
    at = _segment_size_at(packet)
    if at is None or packet.u16(at) <= most:
        return packet
    data = bytearray(packet.data)
    struct.pack_into("!H", data, at, most)
    start = at - (at - packet.l4) % 2  # the 16-bit words that the option lies in
    old, new = packet.data[start : start + 4], bytes(data[start : start + 4])
    if not partial:
        field = packet.l4 + CHECKSUM_OFFSET[TCP]
        struct.pack_into("!H", data, field, updated(packet.u16(field), old, new))
    return replace(packet, data=bytes(data))


def _segment_size_at(packet: Packet) -> int | None:
    """Where the maximum segment size is; None if no option gives one, or the options are no good before it."""
    at = packet.l4 + 20
    while at + 1 < packet.payload_at and packet.u8(at) != 0:
        kind, length = packet.u8(at), 1 if packet.u8(at) == 1 else packet.u8(at + 1)
        if kind != 1 and (length < 2 or at + length > packet.payload_at):
            return None
        if kind == 2 and length == 4:
            return at + 2
        at += length
    return None
