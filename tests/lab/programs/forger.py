"""Sends tunnel packets of its own making over IPv4, as a neighbour on the underlay could.

forger.py LINK MAC SOURCE TARGET TIMES INNER…: each INNER (hexadecimal) as a datagram from SOURCE to TARGET's tunnel
port, in frames to MAC out of LINK, TIMES times. SOURCE may be anybody's address.
"""

import socket
import struct
import sys

TUNNEL_PORT = 50103
ETHERTYPE_IPV4 = b"\x08\x00"


def frame(link_address: bytes, source: str, target: str, inner: bytes) -> bytes:
    """Ethernet, IPv4 and UDP headers around a packet; UDP without a checksum (RFC 768)."""
    udp = struct.pack("!HHHH", TUNNEL_PORT, TUNNEL_PORT, 8 + len(inner), 0)
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp) + len(inner), 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack("!H", 0xFFFF - ((total & 0xFFFF) + (total >> 16))) + header[12:]
    return link_address + b"\x02\x00\x00\x00\x00\x99" + ETHERTYPE_IPV4 + header + udp + inner


def main() -> None:
    link, mac, source, target, times, *inner = sys.argv[1:]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as talker:
        talker.bind((link, 0))
        for _ in range(int(times)):
            for it in inner:
                talker.send(frame(bytes.fromhex(mac.replace(":", "")), source, target, bytes.fromhex(it)))


main()
