"""One packet read: which part of it is which, or why it may not pass.

The order of the checks is part of the rules, because the first one that fails gives the drop its reason: the IP
header, the chain of extension headers (RFC 8200 section 4), a fragment's own fields, the transport header.

A packet is of one of three kinds. A WHOLE one tells its flow: by its ports (TCP, UDP, SCTP), by its identifier
(ICMP echo), or by its addresses alone (all others). A FRAGMENT tells nothing before its datagram is whole. An ERROR
(ICMP) is about the packet that it quotes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address

from tests.oracle import model
from tests.oracle.build import (
    DCCP,
    DESTINATION_OPTIONS,
    FRAGMENT_HEADER,
    HOP_BY_HOP,
    ICMP,
    ICMPV6,
    ROUTING,
    SCTP,
    TCP,
    UDP,
    UDP_LITE,
)
from tests.oracle.checksum import pseudo_sum, words
from tests.oracle.model import Address

WHOLE, FRAGMENT, ERROR = "whole", "fragment", "error"

ECHO_TYPES = {ICMP: (8, 0), ICMPV6: (128, 129)}  # (request, reply)
ERROR_TYPES = {ICMP: (3, 11, 12), ICMPV6: (1, 2, 3, 4)}  # RFC 792 without the dead ones, RFC 4443 section 3
ECHO = -1  # the port that pings go to: not a number, so that no id is the same
NO_PORTS = (0, 0)
CHECKSUM_OFFSET = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2, UDP_LITE: 6, DCCP: 6}
HEADER_SIZE = {UDP: 8, ICMP: 8, ICMPV6: 8, SCTP: 12}  # of what is judged
EXTENSIONS = (HOP_BY_HOP, ROUTING, FRAGMENT_HEADER, DESTINATION_OPTIONS)
EXTENSIONS_MAX = 4
PACKET_MAX = 65_535


class DropError(Exception):
    """A packet that may not pass: the reason that is counted, and how many packets it takes with it."""

    def __init__(self, reason: str, packets: int = 1) -> None:
        super().__init__(reason)
        self.reason, self.packets = reason, packets


def require(condition: bool, reason: str) -> None:
    """Drop for this reason unless the condition holds."""
    if not condition:
        raise DropError(reason)


@dataclass(frozen=True)
class Packet:
    """A packet that passed the checks; offsets are in bytes from its start."""

    data: bytes
    l4: int  # where the transport header starts, or a fragment's data
    protocol: int
    kind: str = WHOLE
    named_at: int = 0  # IPv6: where the fragment header, or the transport protocol, is named

    def u8(self, at: int) -> int:
        return self.data[at]

    def u16(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 2], "big")

    def u32(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 4], "big")

    @property
    def version(self) -> int:
        return self.data[0] >> 4

    @cached_property
    def source(self) -> Address:
        return IPv4Address(self.data[12:16]) if self.version == 4 else IPv6Address(self.data[8:24])

    @cached_property
    def destination(self) -> Address:
        return IPv4Address(self.data[16:20]) if self.version == 4 else IPv6Address(self.data[24:40])

    @property
    def payload_at(self) -> int:
        """Where the transport header ends."""
        if self.protocol == TCP:
            return self.l4 + 4 * (self.u8(self.l4 + 12) >> 4)
        return self.l4 + HEADER_SIZE.get(self.protocol, 0)

    @property
    def payload(self) -> bytes:
        return self.data[self.payload_at :]

    @property
    def is_extended(self) -> bool:
        """IPv6 extension headers precede the transport header."""
        return self.version == 6 and self.l4 > 40

    @property
    def checksum_at(self) -> int | None:
        """Where the transport checksum is, if the protocol has one of the Internet's kind."""
        if self.kind == FRAGMENT or self.protocol not in CHECKSUM_OFFSET:
            return None
        return self.l4 + CHECKSUM_OFFSET[self.protocol]

    @property
    def is_reply(self) -> bool:
        """An ICMP echo reply."""
        return self.protocol in ECHO_TYPES and self.u8(self.l4) == ECHO_TYPES[self.protocol][1]

    @property
    def ports(self) -> tuple[int, int]:
        """(source port, destination port): an echo request goes from its id to ECHO, its reply back."""
        if self.kind != WHOLE:
            return NO_PORTS
        return ports_at(self.data, self.l4, self.protocol) or NO_PORTS

    @property
    def dont_fragment(self) -> bool:
        return self.version == 4 and bool(self.u8(6) & 0x40)

    @property
    def pseudo_sum(self) -> int:
        """The pseudo-header's sum, which ICMP over IPv4 does not have."""
        if self.protocol == ICMP:
            return 0
        return pseudo_sum(self.source, self.destination, self.protocol, len(self.data) - self.l4)

    @property
    def has_checksum(self) -> bool:
        """False where the protocol has none, and for UDP with the field 0: the sender computed none."""
        at = self.checksum_at
        return at is not None and (self.protocol not in (UDP, UDP_LITE) or self.u16(at) != 0)

    @property
    def header_valid(self) -> bool:
        header = self.l4 if self.version == 6 else 4 * (self.u8(0) & 15)
        return self.version == 6 or words(self.data[:header]) == 0xFFFF

    @property
    def transport_valid(self) -> bool:
        """The transport checksum is there and right."""
        total = words(self.data[self.l4 :]) + self.pseudo_sum
        return self.has_checksum and total % 0xFFFF == 0

    # -- a fragment --

    @property
    def offset(self) -> int:
        """Where a fragment's data begins in its datagram, bytes."""
        return 8 * (self.u16(6) & 0x1FFF) if self.version == 4 else self.u16(self.l4 - 6) & 0xFFF8

    @property
    def more(self) -> bool:
        """A fragment that is not the last."""
        return bool(self.u8(6) & 0x20) if self.version == 4 else bool(self.u8(self.l4 - 5) & 1)

    @property
    def identification(self) -> int:
        return self.u16(4) if self.version == 4 else self.u32(self.l4 - 4)

    # -- an error --

    @property
    def quoted(self) -> Quoted:
        """The packet that an ERROR is about."""
        return Quoted(self.data[self.l4 + 8 :])


@dataclass(frozen=True)
class Quoted:
    """The head of a packet, as an ICMP error quotes it; IPv6 extension headers are not looked into."""

    data: bytes

    @property
    def version(self) -> int:
        return self.data[0] >> 4

    @property
    def source(self) -> Address:
        return IPv4Address(self.data[12:16]) if self.version == 4 else IPv6Address(self.data[8:24])

    @property
    def destination(self) -> Address:
        return IPv4Address(self.data[16:20]) if self.version == 4 else IPv6Address(self.data[24:40])

    @property
    def l4(self) -> int:
        return 4 * (self.data[0] & 15) if self.version == 4 else 40

    @property
    def protocol(self) -> int:
        return self.data[9] if self.version == 4 else self.data[6]

    @property
    def ports(self) -> tuple[int, int]:
        return ports_at(self.data, self.l4, self.protocol) or NO_PORTS

    def check(self, version: int) -> None:
        """Malformed unless it is the head of a packet of the error's version, with 8 bytes behind the IP header."""
        require(len(self.data) >= (20 if version == 4 else 40) and self.version == version, model.MALFORMED)
        if version == 4:
            first = not int.from_bytes(self.data[6:8], "big") & 0x1FFF
            require(self.l4 >= 20 and first, model.MALFORMED)
        require(len(self.data) >= self.l4 + 8, model.MALFORMED)
        require(ports_at(self.data, self.l4, self.protocol) is not None, model.MALFORMED)


def ports_at(data: bytes, l4: int, protocol: int) -> tuple[int, int] | None:
    """The ports of a transport header; None for ICMP that is no echo."""
    if protocol in (TCP, UDP, SCTP):
        return struct.unpack_from("!HH", data, l4)
    if protocol not in ECHO_TYPES:
        return NO_PORTS
    request, reply = ECHO_TYPES[ICMP if data[0] >> 4 == 4 else ICMPV6]
    ident = int.from_bytes(data[l4 + 4 : l4 + 6], "big")
    return {request: (ident, ECHO), reply: (ECHO, ident)}.get(data[l4])


def read(data: bytes, super_udp: bool = False) -> Packet:
    """A packet, or DropError; super_udp: data is a UDP super-packet, whose length field means nothing."""
    require(len(data) > 0 and data[0] >> 4 in (4, 6), model.MALFORMED)
    packet = _read_ipv4(data) if data[0] >> 4 == 4 else _read_ipv6(data)
    if packet.kind == FRAGMENT:
        _check_fragment(packet)
        return packet
    size = len(packet.data) - packet.l4
    if packet.protocol in ECHO_TYPES:
        return _read_icmp(packet)
    if packet.protocol == TCP:
        _check_tcp(packet)
    elif packet.protocol == UDP:
        _check_udp(packet, super_udp)
    elif packet.protocol == SCTP:
        require(size >= 12, model.MALFORMED)
    elif packet.protocol in (UDP_LITE, DCCP):
        require(size >= 8, model.MALFORMED)
    return packet


def _read_ipv4(data: bytes) -> Packet:
    require(len(data) >= 20, model.MALFORMED)
    header_length = 4 * (data[0] & 15)
    total_length, _, fragment = struct.unpack_from("!HHH", data, 2)
    require(20 <= header_length <= len(data), model.MALFORMED)
    require(total_length == len(data), model.MALFORMED)
    kind = FRAGMENT if fragment & 0x3FFF else WHOLE
    return Packet(data, header_length, data[9], kind)


def _read_ipv6(data: bytes) -> Packet:
    require(len(data) >= 40, model.MALFORMED)
    require(int.from_bytes(data[4:6], "big") + 40 == len(data), model.MALFORMED)
    number, at, named_at, count = data[6], 40, 6, 0
    while number in EXTENSIONS:
        require(count < EXTENSIONS_MAX and at + 8 <= len(data), model.MALFORMED)
        require(number != HOP_BY_HOP or count == 0, model.MALFORMED)
        require(number != ROUTING or data[at + 3] == 0, model.UNSUPPORTED_PROTOCOL)
        size = 8 if number == FRAGMENT_HEADER else 8 * (data[at + 1] + 1)
        require(at + size <= len(data), model.MALFORMED)
        if number == FRAGMENT_HEADER and int.from_bytes(data[at + 2 : at + 4], "big") & 0xFFF9:
            return Packet(data, at + 8, data[at], FRAGMENT, named_at)
        number, at, named_at, count = data[at], at + size, at, count + 1
    return Packet(data, at, number, named_at=named_at)


def _check_fragment(packet: Packet) -> None:
    """All but the last carry a multiple of 8 bytes, and no datagram is larger than a packet can be."""
    size = len(packet.data) - packet.l4
    require(size > 0 and not (packet.more and size % 8), model.MALFORMED)
    require(packet.l4 + packet.offset + size <= PACKET_MAX, model.MALFORMED)


def _check_tcp(packet: Packet) -> None:
    size = len(packet.data) - packet.l4
    require(size >= 20, model.MALFORMED)
    require(20 <= packet.payload_at - packet.l4 <= size, model.MALFORMED)


def _check_udp(packet: Packet, super_udp: bool) -> None:
    size = len(packet.data) - packet.l4
    require(size >= 8, model.MALFORMED)
    require(super_udp or packet.u16(packet.l4 + 4) == size, model.MALFORMED)


def _read_icmp(packet: Packet) -> Packet:
    require((packet.protocol == ICMP) == (packet.version == 4), model.UNSUPPORTED_PROTOCOL)
    require(len(packet.data) - packet.l4 >= 8, model.MALFORMED)
    kind, code = packet.u8(packet.l4), packet.u8(packet.l4 + 1)
    if kind in ERROR_TYPES[packet.protocol]:
        error = Packet(packet.data, packet.l4, packet.protocol, ERROR)
        error.quoted.check(error.version)
        return error
    require(kind in ECHO_TYPES[packet.protocol] and code == 0, model.UNSUPPORTED_PROTOCOL)
    return packet
