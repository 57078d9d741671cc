"""One packet read: which part of it is which, or why it may not pass.

The order of the checks is part of the rules, because the first one that fails gives the drop its reason:
malformed (the IP header), fragment, unsupported-protocol, malformed (the transport header).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address

from tests.oracle import model
from tests.oracle.build import FRAGMENT_HEADER, ICMP, ICMPV6, MORE_FRAGMENTS, TCP, UDP
from tests.oracle.checksum import pseudo_sum, words
from tests.oracle.model import Address

ECHO_TYPES = {ICMP: (8, 0), ICMPV6: (128, 129)}  # (request, reply)
ECHO = -1  # the port that pings go to: not a number, so that no id is the same
CHECKSUM_OFFSET = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}


class DropError(Exception):
    """A packet that may not pass; the argument is the reason that is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def require(condition: bool, reason: str) -> None:
    """Drop for this reason unless the condition holds."""
    if not condition:
        raise DropError(reason)


@dataclass(frozen=True)
class Packet:
    """A packet that passed the checks; offsets are in bytes from its start."""

    data: bytes
    l4: int  # where the transport header starts
    protocol: int

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
        return self.l4 + (4 * (self.u8(self.l4 + 12) >> 4) if self.protocol == TCP else 8)

    @property
    def payload(self) -> bytes:
        return self.data[self.payload_at :]

    @property
    def checksum_at(self) -> int:
        return self.l4 + CHECKSUM_OFFSET[self.protocol]

    @property
    def is_reply(self) -> bool:
        """An ICMP echo reply."""
        return self.protocol in ECHO_TYPES and self.u8(self.l4) == ECHO_TYPES[self.protocol][1]

    @property
    def ports(self) -> tuple[int, int]:
        """(source port, destination port): an echo request goes from its id to ECHO, its reply back."""
        if self.protocol not in ECHO_TYPES:
            return self.u16(self.l4), self.u16(self.l4 + 2)
        ident = self.u16(self.l4 + 4)
        return (ECHO, ident) if self.is_reply else (ident, ECHO)

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
        """False for UDP with the field 0: the sender computed none."""
        return self.protocol != UDP or self.u16(self.checksum_at) != 0

    @property
    def header_valid(self) -> bool:
        return self.version == 6 or words(self.data[: self.l4]) == 0xFFFF

    @property
    def transport_valid(self) -> bool:
        """The transport checksum is there and right."""
        total = words(self.data[self.l4 :]) + self.pseudo_sum
        return self.has_checksum and total % 0xFFFF == 0


def read(data: bytes, super_udp: bool = False) -> Packet:
    """A packet, or DropError; super_udp: data is a UDP super-packet, whose length field means nothing."""
    require(len(data) > 0 and data[0] >> 4 in (4, 6), model.MALFORMED)
    packet = _read_ipv4(data) if data[0] >> 4 == 4 else _read_ipv6(data)
    if packet.protocol == TCP:
        _check_tcp(packet)
    elif packet.protocol == UDP:
        _check_udp(packet, super_udp)
    else:
        _check_echo(packet)
    return packet


def _read_ipv4(data: bytes) -> Packet:
    require(len(data) >= 20, model.MALFORMED)
    header_length = 4 * (data[0] & 15)
    total_length, _, fragment = struct.unpack_from("!HHH", data, 2)
    require(20 <= header_length <= len(data), model.MALFORMED)
    require(total_length == len(data), model.MALFORMED)
    require(not fragment >> 13 & MORE_FRAGMENTS and not fragment & 0x1FFF, model.FRAGMENT)
    require(data[9] in (TCP, UDP, ICMP), model.UNSUPPORTED_PROTOCOL)
    return Packet(data, header_length, data[9])


def _read_ipv6(data: bytes) -> Packet:
    require(len(data) >= 40, model.MALFORMED)
    payload_length, next_header = struct.unpack_from("!HB", data, 4)
    require(payload_length + 40 == len(data), model.MALFORMED)
    require(next_header != FRAGMENT_HEADER, model.FRAGMENT)
    require(next_header in (TCP, UDP, ICMPV6), model.UNSUPPORTED_PROTOCOL)
    return Packet(data, 40, next_header)


def _check_tcp(packet: Packet) -> None:
    size = len(packet.data) - packet.l4
    require(size >= 20, model.MALFORMED)
    require(20 <= packet.payload_at - packet.l4 <= size, model.MALFORMED)


def _check_udp(packet: Packet, super_udp: bool) -> None:
    size = len(packet.data) - packet.l4
    require(size >= 8, model.MALFORMED)
    require(super_udp or packet.u16(packet.l4 + 4) == size, model.MALFORMED)


def _check_echo(packet: Packet) -> None:
    require(len(packet.data) - packet.l4 >= 8, model.MALFORMED)
    kind, code = packet.u8(packet.l4), packet.u8(packet.l4 + 1)
    require(kind in ECHO_TYPES[packet.protocol] and code == 0, model.UNSUPPORTED_PROTOCOL)
