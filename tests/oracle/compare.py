"""Two outcomes brought into one shape: a path that merges segments is compared with one that does not.

A super-packet written into the TUN is cut again, a partial checksum is finished, and packets are compared in
order a flow. What is then left aside says nothing to a receiver: the IPv4 id of a packet that is never
fragmented (RFC 6864 §4.1), and which of the two zeros of ones' complement a checksum other than UDP's uses.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field

from tests.oracle.build import ACK, PSH, UDP, UDP_LITE
from tests.oracle.checksum import updated
from tests.oracle.model import Address, Outcome
from tests.oracle.oracle import GSO_CARRIES
from tests.oracle.packet import CHECKSUM_OFFSET, ERROR, FRAGMENT, DropError, Packet, read
from tests.oracle.segment import cut, finish
from tests.oracle.virtio import DATA_VALID, GSO_NONE, GSO_UDP_L4, Vnet

Flow = tuple[Address, Address, tuple[int, int], int]
Sent = tuple[str, int, Flow | None]  # where to, and of which flow; None if it cannot be read


@dataclass
class Comparable:
    """An outcome as single packets, in order a flow, and the drops by reason."""

    wire: dict[Sent, list[bytes]] = field(default_factory=dict)
    tun: dict[Flow | None, list[bytes]] = field(default_factory=dict)
    drops: Counter[str] = field(default_factory=Counter)


def comparable(outcome: Outcome) -> Comparable:
    """The outcome, super-packets cut, meaningless bits cleared; AssertionError if a write is wrong."""
    result = Comparable(drops=+Counter(outcome.drops))
    for ip, port, data in outcome.wire:
        result.wire.setdefault((ip, port, _flow(data)), []).append(_one_zero(data))
    for vnet, written in outcome.tun:
        if quotes_little(written):
            result.tun.setdefault(None, []).append(written)
            continue
        for data in pieces(Vnet.unpack(vnet), written):
            packet = read(data)
            result.tun.setdefault(flow_of(packet), []).append(_one_zero(_without_id(packet)))
    return result


def quotes_little(written: bytes) -> bool:
    """An unreachable of ours, about a packet that had less than 8 bytes behind its IP header."""
    start, kind = (20, 3) if written[:1] == b"\x45" else (40, 1)
    protocol = written[9:10] if kind == 3 else written[6:7]
    short = len(written) < start + 8 + start + 8
    return short and protocol in (b"\x01", b"\x3a") and written[start : start + 1] == bytes([kind])


def flow_of(packet: Packet) -> Flow:
    """What packets that must stay in order have in common."""
    return packet.source, packet.destination, packet.ports, packet.protocol


def pieces(vnet: Vnet, written: bytes) -> list[bytes]:
    """The packets that a write stands for; AssertionError if the kernel would refuse or misread it."""
    assert vnet.hdr_len <= len(written), vnet
    packet = read(written, super_udp=vnet.gso_kind == GSO_UDP_L4)
    if vnet.gso_kind != GSO_NONE:
        check_super(vnet, packet)
        return cut(packet, vnet.gso_size)
    if vnet.needs_csum:
        check_partial(vnet, packet)
        return [finish(written, vnet.csum_start, vnet.csum_offset)]
    return [written]


def check_super(vnet: Vnet, packet: Packet) -> None:
    """A super-packet as the kernel segments it: right type and sizes, a pseudo-header's sum as checksum."""
    assert (packet.version, packet.protocol) in GSO_CARRIES[vnet.gso_kind], vnet
    assert vnet.gso_size > 0, vnet
    assert vnet.needs_csum, vnet
    assert (vnet.csum_start, vnet.csum_offset) == (packet.l4, CHECKSUM_OFFSET[packet.protocol]), vnet
    field = packet.u16(packet.l4 + CHECKSUM_OFFSET[packet.protocol])
    assert (field - packet.pseudo_sum) % 0xFFFF == 0, "not the pseudo-header's sum"
    assert packet.header_valid, "IPv4 header checksum of a super-packet"
    assert packet.protocol != UDP or packet.u16(packet.l4 + 4) == len(packet.data) - packet.l4, "UDP length"


def check_partial(vnet: Vnet, packet: Packet) -> None:
    """A partial checksum lies inside the packet and after its IP header."""
    assert vnet.csum_start >= packet.l4, vnet
    assert vnet.csum_start + vnet.csum_offset + 2 <= len(packet.data), vnet


def check_from_wire(vnet: Vnet, written: bytes) -> None:
    """What a write of packets from the underlay must not be, and what is not seen once it is cut again.

    Equal headers, adjacent sequence numbers, valid checksums: a breach of those changes the packets. Left are
    the flags and IP options that would be the same in all of them (the kernel's selftests/net/gro.c), and a
    wrong checksum that is declared valid.
    """
    packet = read(written)
    if vnet.gso_kind == GSO_NONE:
        assert not vnet.flags & DATA_VALID or packet.transport_valid, "a wrong checksum is declared valid"
        return
    assert vnet.hdr_len == packet.payload_at, (vnet, packet.payload_at)
    assert vnet.gso_size < len(packet.payload), "a super-packet of one packet"
    assert packet.version == 6 or packet.l4 == 20, "merged with IP options"
    if vnet.gso_kind != GSO_UDP_L4:
        flags = packet.u8(packet.l4 + 13)
        assert flags in (ACK, ACK | PSH), f"merged with TCP flags {flags:#04x}"


def count_merged(vnet: Vnet, written: bytes) -> int:
    """How many packets a write stands for."""
    return len(pieces(vnet, written))


def _flow(data: bytes) -> Flow | None:
    try:
        return flow_of(read(data))
    except DropError:
        return None


def _without_id(packet: Packet) -> bytes:
    """The packet with id 0 where DF is set, the header checksum as right or wrong as it was."""
    if not packet.dont_fragment or packet.kind == FRAGMENT:
        return packet.data
    data = bytearray(packet.data)
    struct.pack_into("!H", data, 10, updated(packet.u16(10), packet.data[4:6], b"\0\0"))
    data[4:6] = b"\0\0"
    return bytes(data)


def _one_zero(data: bytes) -> bytes:
    """The packet with 0xffff written as 0 in the checksum fields that do not tell the two apart."""
    try:
        packet = read(data)
    except DropError:
        return data
    result = bytearray(data)
    for at in _indistinct(packet):
        if packet.u16(at) == 0xFFFF:
            result[at : at + 2] = b"\0\0"
    return bytes(result)


def _indistinct(packet: Packet) -> list[int]:
    """Where a packet has checksums to which the two zeros are one number."""
    fields = [10] if packet.version == 4 else []
    if packet.checksum_at is not None and packet.protocol not in (UDP, UDP_LITE):
        fields.append(packet.checksum_at)
    if packet.kind == ERROR:
        start, quoted = packet.l4 + 8, packet.quoted
        fields += [start + 10] if packet.version == 4 else []
        if quoted.protocol in CHECKSUM_OFFSET and quoted.protocol not in (UDP, UDP_LITE):
            fields.append(start + quoted.l4 + CHECKSUM_OFFSET[quoted.protocol])
    return [at for at in fields if at + 2 <= len(packet.data)]
