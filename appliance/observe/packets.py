"""A packet as a container would send it: made for ``trace``, and described for people."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

IPAddress = IPv4Address | IPv6Address

PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "sctp": 132}
ICMP6: Final = 58
SIZE_MAX: Final = 65_000
_TTL: Final = 64
_SYN: Final = 0x02
_HEADERS: Final = {1: 8, 6: 20, 17: 8, 132: 12, ICMP6: 8}
_CHECKSUM_AT: Final = {1: 2, 6: 16, 17: 6, ICMP6: 2}


@dataclass(frozen=True)
class Meaning:
    """What a person reads in a packet's headers. Ports are 0 where the protocol has none; those of an echo its id."""

    source: IPAddress
    destination: IPAddress
    protocol: int
    source_port: int
    destination_port: int
    length: int

    def __str__(self) -> str:
        """``tcp 10.18.0.2:40000 → 10.30.30.30:80``"""
        names = {number: name for name, number in PROTOCOLS.items()} | {ICMP6: "icmp"}
        ends = [_end(self.source, self.source_port), _end(self.destination, self.destination_port)]
        return f"{names.get(self.protocol, f'protocol {self.protocol}')} {ends[0]} → {ends[1]}"


def _end(address: IPAddress, port: int) -> str:
    if not port:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def build(
    source: IPAddress, destination: IPAddress, protocol: str, sport: int, dport: int, size: int = 0, fits: bool = True
) -> bytes:
    """A packet with right lengths and checksums: TCP SYN, UDP, echo request, or bare data of a numbered protocol.

    ``size``: bytes of the whole packet, 0 for the least; ``fits``: DF is set. Raises ValueError with a sentence if
    there is no such packet.
    """
    if source.version != destination.version:
        raise ValueError("destination: expected an address of the source's family")
    number = _number(protocol, source.version)
    transport = _transport(number, sport, dport)
    header = 20 if source.version == 4 else 40
    if size and not header + len(transport) <= size <= SIZE_MAX:
        raise ValueError(f"size: expected {header + len(transport)} to {SIZE_MAX} bytes, got {size}")
    transport += bytes(max(0, size - header - len(transport)))
    if number == PROTOCOLS["udp"]:
        transport = transport[:4] + struct.pack("!H", len(transport)) + transport[6:]
    transport = _summed(source, destination, number, transport)
    if source.version == 4:
        return _ipv4(source, destination, number, len(transport), fits) + transport
    head = struct.pack("!IHBB", 6 << 28, len(transport), number, _TTL)
    return head + source.packed + destination.packed + transport


def _number(protocol: str, version: int) -> int:
    if protocol == "icmp" and version == 6:
        return ICMP6
    if protocol in PROTOCOLS:
        return PROTOCOLS[protocol]
    if protocol.isdecimal() and int(protocol) < 256:
        return int(protocol)
    raise ValueError(f"protocol: expected {', '.join(PROTOCOLS)} or a number below 256, got {protocol!r}")


def _transport(number: int, sport: int, dport: int) -> bytes:
    if number in (1, ICMP6):
        return struct.pack("!BBHHH", 8 if number == 1 else 128, 0, 0, sport, 1)
    if number not in _HEADERS:
        return bytes(8)
    data = bytearray(_HEADERS[number])
    struct.pack_into("!HH", data, 0, sport, dport)
    if number == PROTOCOLS["tcp"]:
        data[12:14] = bytes([5 << 4, _SYN])
    return bytes(data)


def _summed(source: IPAddress, destination: IPAddress, number: int, transport: bytes) -> bytes:
    at = _CHECKSUM_AT.get(number)
    if at is None:
        return transport
    pseudo = b"" if number == 1 else source.packed + destination.packed + struct.pack("!II", len(transport), number)
    value = checksum(pseudo + transport)
    if value == 0 and number == PROTOCOLS["udp"]:
        value = 0xFFFF
    return transport[:at] + struct.pack("!H", value) + transport[at + 2 :]


def _ipv4(source: IPAddress, destination: IPAddress, number: int, length: int, fits: bool) -> bytes:
    bits = 0x4000 if fits else 0
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, bits, _TTL, number, 0) + source.packed + destination.packed
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:]


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) & 1)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def read(packet: bytes) -> Meaning | None:
    """What a packet's headers say; None if it has none that can be read. IPv6 extension headers count as protocol."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        header, number = 4 * (packet[0] & 15), packet[9]
        source, destination = packet[12:16], packet[16:20]
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        header, number = 40, packet[6]
        source, destination = packet[8:24], packet[24:40]
    else:
        return None
    ports = _ports(packet[header : header + 8], number)
    return Meaning(ip_address(source), ip_address(destination), number, *ports, len(packet))


def _ports(transport: bytes, number: int) -> tuple[int, int]:
    if number in (1, ICMP6) and len(transport) >= 8:
        return struct.unpack("!H", transport[4:6])[0], 0
    if number in (6, 17, 132) and len(transport) >= 4:
        sport, dport = struct.unpack("!HH", transport[:4])
        return sport, dport
    return 0, 0
