"""The UDP sockets of the workers: made by the supervisor, kept for as long as it runs.

Each worker has
- ``wire``: one socket of the SO_REUSEPORT group on the tunnel port, dual-stack. An eBPF program gives each datagram
  to the worker that owns its flow; the group's order is the order of binding, so all are bound here, in order, and
  none is closed before the others.
- ``sources``: sockets to send from. The receiver's steering hash of a flow chooses one, so the underlay sees several
  source ports (RFC 7510 section 3), and two flows that share a source port share the receiving worker too, as long as
  its number of workers divides the number of ports: trains that GRO joins never mix workers.
- ``fragmenting``: one more socket to send from, for the few packets that may be fragmented on the underlay.
- ``handoff``: bound to the loopback, for packets whose next step belongs to a sibling.

What is too big for the path
----------------------------
``wire`` and ``sources`` have IP_PMTUDISC_DO: IPv4 leaves with DF, and the kernel fragments nothing, silently least of
all. ``fragmenting`` has IP_PMTUDISC_DONT: the kernel cuts what is larger than the path's MTU, and other routers may cut
IPv4 further. That is for packets that nobody can be told to make smaller (RFC 2473 section 7.2): IPv4 without DF, and
IPv6 of at most 1,280 bytes. The options of both levels count, as a dual-stack socket takes those of level IPPROTO_IP
for IPv4-mapped destinations.

What ``sendmsg`` returns, seen on Linux 6.18 (``tests/supervisor/test_sockets.py``), is the same for IPv6 and
IPv4-mapped destinations, whether the device's MTU, the route's, or a learned one is too small:

| | one datagram too big | train (UDP_SEGMENT) whose segments fit | train whose segments are too big |
|---|---|---|---|
| DO | EMSGSIZE, nothing leaves | sent, also if the whole is larger than the MTU | EMSGSIZE, nothing leaves |
| DONT | sent in fragments | sent | EMSGSIZE, nothing leaves: the kernel fragments no trains |

A control message UDP_SEGMENT that names the whole as its only segment is a train. Older kernels answer EINVAL where a
train gets EMSGSIZE here (net/ipv4/udp.c, udp_send_skb). So what ``fragmenting`` sends is sent one by one.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

SOL_UDP, UDP_GRO, UDP_SEGMENT = 17, 104, 103
SO_ATTACH_REUSEPORT_EBPF = 52
SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER = 10, 23  # ip(7), ipv6(7); the socket module has neither before 3.12
PMTUDISC_DONT, PMTUDISC_DO = 0, 2  # the same values for both families


@dataclass
class WorkerSockets:
    """The sockets of one worker."""

    wire: socket.socket
    handoff: socket.socket
    sources: list[socket.socket]
    fragmenting: socket.socket

    def named(self) -> dict[str, int]:
        """All descriptors, by name."""
        sources = {f"source.{i}": sock.fileno() for i, sock in enumerate(self.sources)}
        one = {"wire": self.wire, "handoff": self.handoff, "fragmenting": self.fragmenting}
        return {name: sock.fileno() for name, sock in one.items()} | sources

    @property
    def handoff_port(self) -> int:
        """Port that siblings know this worker's hand-overs by."""
        return int(self.handoff.getsockname()[1])

    def close(self) -> None:
        """Close them all."""
        for sock in (self.wire, self.handoff, self.fragmenting, *self.sources):
            sock.close()


def adopt(take: Callable[[str], int], source_ports: int) -> WorkerSockets:
    """The sockets of a worker that exist already; ``take`` gives the descriptor of a name. Raises KeyError."""
    wire, handoff, fragmenting = (socket.socket(fileno=take(name)) for name in ("wire", "handoff", "fragmenting"))
    sources = [socket.socket(fileno=take(f"source.{i}")) for i in range(source_ports)]
    return WorkerSockets(wire, handoff, sources, fragmenting)


def dual_stack(
    address: str, port: int, buffer: int, *, reuse: bool = False, discovery: int = PMTUDISC_DO
) -> socket.socket:
    """A non-blocking UDP socket for both families. ``discovery``: what becomes of packets that are too big (module).

    Raises OSError.
    """
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, discovery)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, discovery)
        _set_buffers(sock, buffer)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def _set_buffers(sock: socket.socket, size: int) -> None:
    """Set both buffers, beyond the sysctl limits where permitted."""
    for forced, plain in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, size)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, size)


def open_all(workers: int, port: int, source_ports: int, buffer: int, *, gro: bool) -> list[WorkerSockets]:
    """The sockets of all workers. Raises OSError if the port is taken, with its number in the message."""
    opened: list[WorkerSockets] = []
    try:
        for _ in range(workers):
            opened.append(_open(port, source_ports, buffer, gro=gro))
    except OSError as error:
        for sockets in opened:
            sockets.close()
        reason = os.strerror(error.errno or 0)
        raise OSError(error.errno, f"tunnel.port: cannot bind UDP port {port}: {reason}") from error
    return opened


def _open(port: int, source_ports: int, buffer: int, *, gro: bool) -> WorkerSockets:
    wire = dual_stack("::", port, buffer, reuse=True)
    if gro:
        wire.setsockopt(SOL_UDP, UDP_GRO, 1)
    handoff = dual_stack("::ffff:127.0.0.1", 0, buffer)
    sources = [dual_stack("::", 0, buffer) for _ in range(source_ports)]
    return WorkerSockets(wire, handoff, sources, dual_stack("::", 0, buffer, discovery=PMTUDISC_DONT))


def steer(sockets: list[WorkerSockets], program: int) -> None:
    """Let a loaded eBPF program choose the socket of each datagram. Raises OSError if the kernel cannot."""
    sockets[0].wire.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, struct.pack("i", program))
