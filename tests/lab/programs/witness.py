"""Counts the marks in what reaches a container, whatever its kernel thinks of it, until its input ends.

witness.py LINK MARK: MARK is hexadecimal. Prints "ready", and the number so far for each line of input. What several
packets were joined into has as many marks.
"""

import select
import socket
import sys

ETH_P_ALL = 3  # linux/if_ether.h
OUTGOING = 4  # PACKET_OUTGOING, linux/if_packet.h
SO_RCVBUFFORCE = 33
BUFFER = 32 << 20


def main() -> None:
    mark, seen = bytes.fromhex(sys.argv[2]), 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        listener.bind((sys.argv[1], ETH_P_ALL))
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if listener in ready:
                data, (_, _, kind, *_) = listener.recvfrom(65535)
                seen += data.count(mark) if kind != OUTGOING else 0
            elif sys.stdin.readline():
                print(seen, flush=True)
            else:
                break


main()
