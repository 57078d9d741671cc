"""Sends tunnel packets of its own making, as a neighbour on the underlay could, until its input ends.

forger.py LINK MAC TARGET4 TARGET6: a line of input is `SOURCE SIZE INNER…`: each INNER (hexadecimal) as a datagram from
SOURCE, which may be anybody's address, to the tunnel port, in a frame to MAC out of LINK. SIZE, if it is not 0, goes
into the frame's segmentation metadata: the kernel is told that the datagram is a train of segments of that size
(struct virtio_net_hdr, packet(7)). Prints "ready", and "sent" after each line.
"""

import socket
import struct
import sys
from ipaddress import IPv4Address, ip_address

TUNNEL_PORT = 50103
PACKET_VNET_HDR = 15  # linux/if_packet.h
SOL_PACKET = 263
NEEDS_CSUM, GSO_UDP_L4 = 1, 5
ETHERNET, UDP = 14, 17
OWN_MAC = b"\x02\x00\x00\x00\x00\x99"


def _sum(data: bytes) -> int:
    data += bytes(len(data) & 1)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Forger:
    """The frames from one source."""

    def __init__(self, link_address: bytes, source: str, target: str) -> None:
        ends = ip_address(source), ip_address(target)
        self._v4 = isinstance(ends[0], IPv4Address)
        self._ends = ends[0].packed + ends[1].packed
        self._ethernet = link_address + OWN_MAC + (b"\x08\x00" if self._v4 else b"\x86\xdd")
        self._header = 20 if self._v4 else 40

    def frame(self, inner: bytes, size: int) -> bytes:
        """Metadata, Ethernet, IP and UDP headers around a packet."""
        length = 8 + len(inner)
        pseudo = _sum(self._ends + struct.pack("!HH", UDP, length))
        field = pseudo if size else 0
        if not size and not self._v4:  # over IPv4 it may have none (RFC 768), over IPv6 it may not
            field = 0xFFFF - _sum(struct.pack("!HHHHH", pseudo, TUNNEL_PORT, TUNNEL_PORT, length, 0) + inner)
        udp = struct.pack("!HHHH", TUNNEL_PORT, TUNNEL_PORT, length, field or 0)
        at = ETHERNET + self._header
        metadata = struct.pack("=BBHHHH", NEEDS_CSUM, GSO_UDP_L4, at + 8, size, at, 6) if size else bytes(10)
        return metadata + self._ethernet + self._ip(length) + udp + inner

    def _ip(self, length: int) -> bytes:
        if not self._v4:
            return struct.pack("!IHBB", 6 << 28, length, UDP, 64) + self._ends
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, UDP, 0) + self._ends
        return header[:10] + struct.pack("!H", 0xFFFF - _sum(header)) + header[12:]


def main() -> None:
    link, mac, *targets = sys.argv[1:]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as talker:
        talker.bind((link, 0))
        talker.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        print("ready", flush=True)
        for order in sys.stdin:
            source, size, *inner = order.split()
            forger = Forger(bytes.fromhex(mac.replace(":", "")), source, targets[":" in source])
            for it in inner:
                talker.send(forger.frame(bytes.fromhex(it if it != "-" else ""), int(size)))
            print("sent", flush=True)


main()
