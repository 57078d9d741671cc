"""What a node says itself to its containers: TCP resets (RFC 9293 section 3.10.7.1), ICMP errors (RFC 792, 1191, 4443).

A packet that cannot go on is answered, but for what must not be answered at all: ICMP errors, resets, and what was
sent to a group (RFC 1122 section 3.2.2, RFC 4443 section 2.4(e)). A sender may get ten answers at once, and then one
each 50 ms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address

from tests.oracle.build import ACK, FIN, RST, SYN, TCP, error, tcp
from tests.oracle.model import Address
from tests.oracle.packet import ERROR, Packet

BURST, INTERVAL = 10, 50_000_000  # answers, nanoseconds
QUOTE = {4: 548, 6: 1232}  # with headers the smallest packet that every path takes: RFC 1812 4.3.2.3, RFC 4443 2.4(c)
HOST_UNREACHABLE = {4: (3, 1), 6: (1, 3)}  # (type, code)
PACKET_TOO_BIG = {4: (3, 4), 6: (2, 0)}


@dataclass
class Replies:
    """The answers of a node that has these addresses in the overlay."""

    gateways: list[str]
    _full_at: dict[Address, int] = field(default_factory=dict)  # when a sender may get ten at once again

    def unreachable(self, packet: Packet, now: int) -> list[bytes]:
        """Nobody is there."""
        if _forbids(packet) or packet.is_reply or not self._may(packet.source, now):
            return []
        if packet.protocol == TCP:
            return [_reset(packet)]
        return [self._error(packet, HOST_UNREACHABLE[packet.version])]

    def too_big(self, packet: Packet, mtu: int, now: int) -> list[bytes]:
        """The path does not take it; `mtu` is what it takes."""
        if _forbids(packet) or not self._may(packet.source, now):
            return []
        return [self._error(packet, PACKET_TOO_BIG[packet.version], mtu if packet.version == 4 else max(mtu, 1280))]

    def _may(self, source: Address, now: int) -> bool:
        full_at = max(self._full_at.get(source, 0), now) + INTERVAL
        if full_at - now > BURST * INTERVAL:
            return False
        self._full_at[source] = full_at
        return True

    def _error(self, packet: Packet, what: tuple[int, int], rest: int = 0) -> bytes:
        """An error from the node, or if it has no address from where the packet was to go."""
        own = [address for address in self.gateways if ip_address(address).version == packet.version]
        source = own[0] if own else str(packet.destination)
        quote = packet.data[: QUOTE[packet.version]]
        return error(source, str(packet.source), *what, quote, rest, fragment_flags=0)


def _forbids(packet: Packet) -> bool:
    """Whether nothing may be said about a packet."""
    is_reset = packet.protocol == TCP and bool(packet.u8(packet.l4 + 13) & RST)
    return packet.kind == ERROR or is_reset or _is_group(packet.destination)


def _is_group(address: Address) -> bool:
    """Multicast, broadcast and what is reserved beside them; also IPv4 in IPv6's clothes, which is nobody."""
    if address.version == 6:
        return address.packed[0] == 0xFF or address.packed[:12] == bytes(10) + b"\xff\xff"
    return address.packed[0] >= 224


def _reset(packet: Packet) -> bytes:
    """What a closed port says."""
    sport, dport = packet.ports
    flags = packet.u8(packet.l4 + 13)
    ends = str(packet.destination), str(packet.source), dport, sport
    if flags & ACK:
        return tcp(*ends, seq=packet.u32(packet.l4 + 8), ack=0, flags=RST, window=0, fragment_flags=0)
    length = len(packet.payload) + bool(flags & SYN) + bool(flags & FIN)
    acknowledged = (packet.u32(packet.l4 + 4) + length) % 2**32
    return tcp(*ends, seq=0, ack=acknowledged, flags=RST | ACK, window=0, fragment_flags=0)
