"""Sockets of the generators: of the address's family, blocking, with timeouts that the kernel keeps.

Python's own `settimeout` makes a descriptor non-blocking, which compiled code would spin on.
"""

import socket
import struct

WAIT = 5.0
"""Seconds that an end waits for its counterpart before it gives up."""
_TIMEVAL = struct.Struct("@ll")


def limit(endpoint: socket.socket, seconds: float) -> None:
    """A blocking receive gives up after so many seconds (SO_RCVTIMEO, socket(7))."""
    whole = int(seconds)
    value = _TIMEVAL.pack(whole, int((seconds - whole) * 1e6))
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)


def bound(kind: socket.SocketKind, port: int) -> socket.socket:
    """A socket that takes both families on a port."""
    endpoint = socket.socket(socket.AF_INET6, kind)
    endpoint.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    endpoint.bind(("::", port))
    return endpoint


def connected(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    """A socket with one peer. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    endpoint = socket.socket(family, kind)
    limit(endpoint, WAIT)
    endpoint.connect((address, port))
    return endpoint
