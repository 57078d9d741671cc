"""Sends one datagram, or opens one connection, that nobody takes, and tells how the kernel says so.

complaint.py udp|tcp ADDRESS PORT: prints a JSON object: error (the errno's name, null if there was an answer) and
seconds. For UDP the socket asks for all ICMP errors (IP_RECVERR, ip(7)), as `ping` and resolvers do.
"""

import errno
import json
import socket
import sys
import time

RECVERR = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
"""IP_RECVERR, IPV6_RECVERR (linux/in.h, linux/in6.h)."""
TIMEOUT_S = 10.0


def main() -> None:
    protocol, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    error, began = None, time.monotonic()
    with socket.socket(family, kind) as talker:
        talker.settimeout(TIMEOUT_S)
        if protocol == "udp":
            talker.setsockopt(*RECVERR[family], 1)
        try:
            talker.connect((address, port))
            talker.send(b"?")
            talker.recv(1)
        except TimeoutError:
            error = "ETIMEDOUT"
        except OSError as refused:
            error = errno.errorcode[refused.errno or 0]
    print(json.dumps({"error": error, "seconds": time.monotonic() - began}))


main()
