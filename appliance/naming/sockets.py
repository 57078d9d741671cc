"""The resolver's sockets, opened by the supervisor, which may bind what the resolver may not.

Each address of the bridge gets a UDP socket and a listening TCP socket twice: bound to the bridge, and bound to the
loopback, where questions of the node's own programs come from. With SO_REUSEPORT, so that a resolver that still
answers for a supervisor that died is replaced without a gap. mDNS has a socket a family, on the bridge alone.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import Final

from appliance.tables.layout import IPAddress

MDNS_PORT: Final = 5353
GROUP_V4: Final = "224.0.0.251"
GROUP_V6: Final = "ff02::fb"
HOPS: Final = 255
"""RFC 6762 section 11."""
BUFFER: Final = 1 << 20
"""Bytes of each UDP socket: a burst of some thousand queries."""
BACKLOG: Final = 128
LOOPBACK: Final = "lo"
_FREEBIND, _V6_FREEBIND = 15, 78
"""IP_FREEBIND, IPV6_FREEBIND (linux/in.h, in6.h): the address may be there a moment later."""


def open_dns(addresses: Iterable[IPAddress], bridge: str, port: int) -> list[socket.socket]:
    """All DNS sockets. Raises OSError."""
    opened: list[socket.socket] = []
    try:
        for address in addresses:
            for device in (bridge, LOOPBACK):
                for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                    opened.append(_bound(address, device, port, kind))
    except OSError as error:
        _close(opened)
        raise OSError(error.errno, f"naming.port: cannot bind port {port} of the bridge: {error.strerror}") from error
    return opened


def open_mdns(bridge: str, versions: Iterable[int]) -> list[socket.socket]:
    """The mDNS sockets, one of each IP version. Raises OSError."""
    opened: list[socket.socket] = []
    try:
        for version in versions:
            opened.append(_multicast(bridge, version))
    except OSError:
        _close(opened)
        raise
    return opened


def _new(version: int, kind: int, device: str) -> socket.socket:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if version == 6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    return sock


def _bound(address: IPAddress, device: str, port: int, kind: int) -> socket.socket:
    sock = _new(address.version, kind, device)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        level, option = (socket.IPPROTO_IP, _FREEBIND) if address.version == 4 else (socket.IPPROTO_IPV6, _V6_FREEBIND)
        sock.setsockopt(level, option, 1)
        if kind == socket.SOCK_DGRAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(address), port))
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _multicast(bridge: str, version: int) -> socket.socket:
    sock = _new(version, socket.SOCK_DGRAM, bridge)
    index = socket.if_nametoindex(bridge)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if version == 4:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, HOPS)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, HOPS)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
            here = struct.pack("=4s4si", socket.inet_aton(GROUP_V4), bytes(4), index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, here)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
            sock.bind(("", MDNS_PORT))
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, HOPS)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, HOPS)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            here = socket.inet_pton(socket.AF_INET6, GROUP_V6) + struct.pack("=i", index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, here)
            sock.bind(("::", MDNS_PORT))
    except OSError:
        sock.close()
        raise
    return sock


def _close(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()
