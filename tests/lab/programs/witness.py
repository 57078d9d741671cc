"""Counts the packets with a mark that reach a container, whatever its kernel thinks of them, until its input ends.

witness.py LINK MARK: prints "ready", and at the end the number. MARK is hexadecimal.
"""

import select
import socket
import sys

ETH_P_ALL = 3  # linux/if_ether.h


def main() -> None:
    mark, seen = bytes.fromhex(sys.argv[2]), 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as listener:
        listener.bind((sys.argv[1], ETH_P_ALL))
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if listener in ready:
                seen += mark in listener.recv(65535)
            elif ready:
                break
    print(seen)


main()
