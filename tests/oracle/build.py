"""Packets for tests, spelled field by field.

IPv4 (RFC 791), IPv6 (RFC 8200), TCP (RFC 9293), UDP (RFC 768), SCTP (RFC 9260), UDP-Lite (RFC 3828), ICMP echo and
errors (RFC 792, RFC 4443), and the fragments of any of them.
Every field has a usual value and can be given a wrong one: lengths, checksums, versions. A checksum is
"valid", "partial" (the pseudo-header's sum, not inverted: what CHECKSUM_PARTIAL leaves to a device), or a
number; `error` is added to a valid one in ones' complement, so that a test can say how wrong it has to stay.
"""

from __future__ import annotations

import itertools
import struct
from ipaddress import IPv4Address, ip_address
from typing import Literal, TypedDict, Unpack, cast

from tests.oracle.checksum import checksum as checksum_of
from tests.oracle.checksum import fold, pseudo_sum
from tests.oracle.model import Address

ICMP, TCP, UDP, DCCP, ICMPV6, SCTP, UDP_LITE = 1, 6, 17, 33, 58, 132, 136
HOP_BY_HOP, ROUTING, FRAGMENT_HEADER, DESTINATION_OPTIONS = 0, 43, 44, 60

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))

MORE_FRAGMENTS, DONT_FRAGMENT = 1, 2

NOP_NOP_TIMESTAMP = bytes.fromhex("0101080a")  # RFC 7323 appendix A; two 32-bit values follow

Fill = Literal["valid", "partial"] | int


class Network(TypedDict, total=False):
    """The IP header's fields; those of the other family are ignored."""

    version: int
    ttl: int  # or hop limit
    tos: int  # or traffic class
    ip_length: int  # IPv4 total length, IPv6 payload length
    ip_id: int  # IPv4
    fragment_flags: int
    fragment_offset: int  # in units of 8 bytes
    ihl: int
    ip_options: bytes  # IPv4
    header_error: int  # IPv4 header checksum
    flow_label: int


class TcpFields(Network, total=False):
    """A TCP header's fields; `options` are TCP's, `ip_options` the IP header's."""

    seq: int
    ack: int
    flags: int
    window: int
    urgent: int
    options: bytes
    data_offset: int
    checksum: Fill
    error: int


class UdpFields(Network, total=False):
    """A UDP header's fields."""

    udp_length: int
    checksum: Fill
    error: int


class ErrorFields(Network, total=False):
    """An ICMP error's own fields."""

    checksum: Fill
    error: int


class EchoFields(ErrorFields, total=False):
    """An ICMP echo message's fields; `kind` overrides the type that `reply` stands for."""

    reply: bool
    sequence: int
    kind: int
    code: int


def ip(source: str, destination: str, protocol: int, body: bytes, **network: Unpack[Network]) -> bytes:
    """An IP packet around body, in the family of its addresses."""
    ends = ip_address(source), ip_address(destination)
    family = _ipv4 if ends[0].version == 4 else _ipv6
    return family(*ends, protocol, body, network)


def _ipv4(source: Address, destination: Address, protocol: int, body: bytes, network: Network) -> bytes:
    options = network.get("ip_options", b"")
    header_length = 20 + len(options)
    header = struct.pack(
        "!BBHHHBBH4s4s",
        network.get("version", 4) << 4 | network.get("ihl", header_length // 4),
        network.get("tos", 0),
        network.get("ip_length", header_length + len(body)),
        network.get("ip_id", 0),
        network.get("fragment_flags", DONT_FRAGMENT) << 13 | network.get("fragment_offset", 0),
        network.get("ttl", 64),
        protocol,
        0,
        source.packed,
        destination.packed,
    )
    field = fold(checksum_of(header + options) + network.get("header_error", 0))
    return header[:10] + struct.pack("!H", field) + header[12:] + options + body


def _ipv6(source: Address, destination: Address, protocol: int, body: bytes, network: Network) -> bytes:
    first = network.get("version", 6) << 28 | network.get("tos", 0) << 20 | network.get("flow_label", 0)
    length = network.get("ip_length", len(body))
    header = struct.pack("!IHBB", first, length, protocol, network.get("ttl", 64))
    return header + source.packed + destination.packed + body


def _filled(body: bytes, at: int, fill: Fill, error: int, pseudo: int) -> bytes:
    """Body with its checksum field, at `at` and still zero, filled in."""
    if fill == "partial":
        field = pseudo
    elif fill == "valid":
        field = fold(checksum_of(body, pseudo) + error)
    else:
        field = fill
    return body[:at] + struct.pack("!H", field) + body[at + 2 :]


def _pseudo(source: str, destination: str, protocol: int, length: int) -> int:
    return pseudo_sum(ip_address(source), ip_address(destination), protocol, length)


def tcp(
    source: str, destination: str, sport: int, dport: int, payload: bytes = b"", **fields: Unpack[TcpFields]
) -> bytes:
    """A TCP segment (RFC 9293 §3.1)."""
    options = fields.get("options", b"")
    header = struct.pack(
        "!HHIIBBHHH",
        sport,
        dport,
        fields.get("seq", 1) % 2**32,
        fields.get("ack", 1),
        fields.get("data_offset", (20 + len(options)) // 4) << 4,
        fields.get("flags", ACK),
        fields.get("window", 65535),
        0,
        fields.get("urgent", 0),
    )
    body = header + options + payload
    pseudo = _pseudo(source, destination, TCP, len(body))
    body = _filled(body, 16, fields.get("checksum", "valid"), fields.get("error", 0), pseudo)
    return ip(source, destination, TCP, body, **_network(fields))


def udp(
    source: str, destination: str, sport: int, dport: int, payload: bytes = b"", **fields: Unpack[UdpFields]
) -> bytes:
    """A UDP datagram; a valid checksum that comes out as zero is written 0xffff (RFC 768)."""
    length = 8 + len(payload)
    fill = fields.get("checksum", "valid")
    body = struct.pack("!HHHH", sport, dport, fields.get("udp_length", length), 0) + payload
    body = _filled(body, 6, fill, fields.get("error", 0), _pseudo(source, destination, UDP, length))
    if fill == "valid" and body[6:8] == b"\0\0":
        body = body[:6] + b"\xff\xff" + body[8:]
    return ip(source, destination, UDP, body, **_network(fields))


def echo(source: str, destination: str, ident: int, payload: bytes = b"ping", **fields: Unpack[EchoFields]) -> bytes:
    """ICMP echo (RFC 792), or ICMPv6 echo (RFC 4443 §4), whose checksum covers a pseudo-header too."""
    v4 = isinstance(ip_address(source), IPv4Address)
    protocol, (request, answer) = (ICMP, (8, 0)) if v4 else (ICMPV6, (128, 129))
    kind = fields.get("kind", answer if fields.get("reply") else request)
    body = struct.pack("!BBHHH", kind, fields.get("code", 0), 0, ident, fields.get("sequence", 1)) + payload
    pseudo = 0 if v4 else _pseudo(source, destination, protocol, len(body))
    body = _filled(body, 2, fields.get("checksum", "valid"), fields.get("error", 0), pseudo)
    return ip(source, destination, protocol, body, **_network(fields))


def error(
    source: str, destination: str, kind: int, code: int, quote: bytes, rest: int = 0, **fields: Unpack[ErrorFields]
) -> bytes:
    """An ICMP error (RFC 792, RFC 4443 section 3); `rest`: the four bytes before what it quotes."""
    v4 = isinstance(ip_address(source), IPv4Address)
    protocol = ICMP if v4 else ICMPV6
    body = struct.pack("!BBHI", kind, code, 0, rest) + quote
    pseudo = 0 if v4 else _pseudo(source, destination, protocol, len(body))
    body = _filled(body, 2, fields.get("checksum", "valid"), fields.get("error", 0), pseudo)
    return ip(source, destination, protocol, body, **_network(fields))


def light(source: str, destination: str, payload: bytes = b"", **fields: Unpack[UdpFields]) -> bytes:
    """A UDP-Lite datagram that its checksum covers whole (RFC 3828), ports 5 to 6."""
    body = struct.pack("!HHHH", 5, 6, 0, 0) + payload
    pseudo = _pseudo(source, destination, UDP_LITE, len(body))
    body = _filled(body, 6, fields.get("checksum", "valid"), fields.get("error", 0), pseudo)
    return ip(source, destination, UDP_LITE, body, **_network(fields))


def sctp(source: str, destination: str, sport: int, dport: int, **network: Unpack[Network]) -> bytes:
    """An SCTP packet without chunks; its checksum (CRC32c, here any) does not cover the addresses."""
    return ip(source, destination, SCTP, struct.pack("!HHII", sport, dport, 7, 0xC5C5C5C5), **network)


def extended(packet: bytes, *headers: tuple[int, bytes]) -> bytes:
    """An IPv6 packet with extension headers (number, content from the third byte on) behind its header."""
    following, chain = packet[6], b""
    for number, content in reversed(headers):
        padded = content + bytes(-(len(content) + 2) % 8)
        chain = bytes([following, (len(padded) + 2) // 8 - 1]) + padded + chain
        following = number
    length = len(packet) - 40 + len(chain)
    return packet[:4] + struct.pack("!HB", length, following) + packet[7:40] + chain + packet[40:]


def fragments(packet: bytes, *sizes: int, ident: int = 7, at: int = 0) -> list[bytes]:
    """A packet in pieces with so many bytes of data each, and one with the rest.

    `at`: where its fragmentable part begins, if not behind the IPv4 header or the fixed IPv6 header.
    """
    start = at or (4 * (packet[0] & 15) if packet[0] >> 4 == 4 else 40)
    ends = [start + sum(sizes[:n]) for n in range(len(sizes) + 1)] + [len(packet)]
    return [
        fragment(packet, start, begin, end, ident, more=end < len(packet)) for begin, end in itertools.pairwise(ends)
    ]


def fragment(packet: bytes, start: int, begin: int, end: int, ident: int, more: bool) -> bytes:
    """The piece of a packet that carries its bytes from begin to end; the first `start` bytes are repeated."""
    family = _fragment4 if packet[0] >> 4 == 4 else _fragment6
    return family(packet[:start], packet[begin:end], begin - start, ident, more)


def _fragment4(head: bytes, data: bytes, offset: int, ident: int, more: bool) -> bytes:
    place = (head[6] & 0xC0) << 8 | more << 13 | offset // 8
    fields = struct.pack("!HHH", len(head) + len(data), ident, place)
    header = head[:2] + fields + head[8:10] + b"\0\0" + head[12:]
    return header[:10] + struct.pack("!H", checksum_of(header)) + header[12:] + data


def _fragment6(head: bytes, data: bytes, offset: int, ident: int, more: bool) -> bytes:
    named_at, at = 6, 40
    while at < len(head):
        size = 8 if head[named_at] == FRAGMENT_HEADER else 8 * (head[at + 1] + 1)
        named_at, at = at, at + size
    header = struct.pack("!BBHI", head[named_at], 0, offset | more, ident)
    head = head[:named_at] + bytes([FRAGMENT_HEADER]) + head[named_at + 1 :]
    return head[:4] + struct.pack("!H", len(head) - 40 + 8 + len(data)) + head[6:] + header + data


def _network(fields: TcpFields | UdpFields | ErrorFields) -> Network:
    """The IP header's part of the fields."""
    return cast(Network, {name: value for name, value in fields.items() if name in Network.__annotations__})
