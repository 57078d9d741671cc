"""What the node says to a container whose packet cannot go on, as fixtures expect it."""

from __future__ import annotations

from ipaddress import ip_address

from tests.oracle.build import RST, error, tcp
from tests.oracle.packet import read
from tests.packets.world import GATEWAY

QUOTED = (548, 1232)


def reset(packet: bytes) -> bytes:
    """The answer to a TCP packet with ACK, from the address that it was sent to."""
    view = read(packet)
    sport, dport = view.ports
    ends = str(view.destination), str(view.source), dport, sport
    return tcp(*ends, seq=view.u32(view.l4 + 8), ack=0, flags=RST, window=0, fragment_flags=0)


def unreachable(packet: bytes) -> bytes:
    """Host or address unreachable, from the node."""
    return _error(packet, (3, 1), (1, 3))


def too_big(packet: bytes, mtu: int) -> bytes:
    """Fragmentation needed or packet too big, from the node."""
    return _error(packet, (3, 4), (2, 0), mtu)


def _error(packet: bytes, four: tuple[int, int], six: tuple[int, int], rest: int = 0) -> bytes:
    sender = read(packet).source
    family = (4, 6).index(ip_address(sender).version)
    quote = packet[: QUOTED[family]]
    return error(GATEWAY[family], str(sender), *(four, six)[family], quote, rest, fragment_flags=0)
