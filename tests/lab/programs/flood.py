"""Offers as many UDP flows as asked for, one datagram each, as fast as it can.

flood.py ADDRESS COUNT: prints how many the kernel took. Ports are those of the raw packets; no socket has them.
"""

import socket
import struct
import sys

PORTS = 50_000
FIRST_PORT = 10_000


def main() -> None:
    target, count, taken = (sys.argv[1], 0), int(sys.argv[2]), 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as talker:
        for number in range(count):
            ports = FIRST_PORT + number % PORTS, 1000 + number // PORTS
            try:
                taken += talker.sendto(struct.pack("!HHHH", *ports, 8, 0), target) > 0
            except OSError:
                continue
    print(taken)


main()
