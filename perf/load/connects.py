"""New TCP connections, one after the other: connect, take the server's byte, reset. How many a second, and how long
each takes.

The reset leaves no TIME_WAIT behind, which would end the supply of ports after 28,000 connections. A connection
counts when the server's byte has come: the server has accepted it, and the path has carried it both ways."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perf.load import histogram
from perf.load.histogram import record
from perf.load.native import (
    NOWHERE,
    SECOND,
    accept,
    close,
    compiled,
    connect,
    monotonic,
    open_socket,
    recv,
    send,
    set_option,
)
from perf.load.sockets import bound, limit

WAIT = 1.5
"""Seconds after which a server without a new connection is done, and a client gives up on one."""
BACKLOG = 1024
STREAM, SOL_SOCKET, LINGER = socket.SOCK_STREAM.value, socket.SOL_SOCKET, socket.SO_LINGER


@dataclass(frozen=True)
class Connected:
    """Connections made, those that failed, the seconds they took, percentiles in µs."""

    connections: int
    failed: int
    seconds: float
    percentiles: dict[str, float]


@dataclass(frozen=True)
class Accepted:
    """Connections that the server took."""

    connections: int


@compiled
def _connect(
    family: int, address: NDArray[np.uint8], linger: NDArray[np.uint8], times: NDArray[np.int64], duration: int
) -> tuple[int, int, int]:
    """Connects for `duration` ns: connections, failures, ns."""
    clock = np.zeros(2, np.int64)
    byte = np.zeros(1, np.uint8)
    begin = now = monotonic(clock)
    made = failed = 0
    while now - begin < duration:
        handle = open_socket(family, STREAM, 0)
        done = connect(handle, address.ctypes.data, len(address)) == 0 and recv(handle, byte.ctypes.data, 1, 0) == 1
        before, now = now, monotonic(clock)
        if done:
            made += 1
            record(times, now - before)
        else:
            failed += 1
        set_option(handle, SOL_SOCKET, LINGER, linger.ctypes.data, len(linger))
        close(handle)
    return made, failed, now - begin


@compiled
def _accept(handle: int, byte: NDArray[np.uint8]) -> int:
    """Accepts, sends a byte and closes when the peer has, until none comes for the socket's time-out: how many."""
    taken = 0
    while True:
        peer = accept(handle, 0, 0)
        if peer < 0:
            if taken or handle == NOWHERE:
                return taken
            continue
        send(peer, byte.ctypes.data, 1, 0x4000)  # MSG_NOSIGNAL
        close(peer)
        taken += 1


def _packed(address: str, port: int) -> tuple[int, NDArray[np.uint8]]:
    """Family, and struct sockaddr_in or sockaddr_in6 (ip(7), ipv6(7))."""
    if ":" in address:
        raw = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0)
        raw += socket.inet_pton(socket.AF_INET6, address) + bytes(4)
        return socket.AF_INET6.value, np.frombuffer(raw, np.uint8).copy()
    raw = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)
    return socket.AF_INET.value, np.frombuffer(raw, np.uint8).copy()


def _linger() -> NDArray[np.uint8]:
    """Struct linger: close at once, by RST."""
    return np.frombuffer(struct.pack("=ii", 1, 0), np.uint8).copy()


def prepare() -> None:
    """Compiles the client's loop."""
    _connect(0, np.zeros(16, np.uint8), _linger(), histogram.empty(), 0)


def connect_for(address: str, port: int, seconds: float) -> Connected:
    """Connects one time after the other for so many seconds."""
    times = histogram.empty()
    made, failed, duration = _connect(*_packed(address, port), _linger(), times, int(seconds * SECOND))
    return Connected(made, failed, duration / SECOND, histogram.percentiles(times))


def server(port: int) -> socket.socket:
    """A listening socket, the loop compiled."""
    _accept(NOWHERE, np.zeros(1, np.uint8))
    endpoint = bound(socket.SOCK_STREAM, port)
    endpoint.listen(BACKLOG)
    limit(endpoint, WAIT)
    return endpoint


def accept_all(endpoint: socket.socket) -> Accepted:
    """Serves one client until it is done."""
    return Accepted(_accept(endpoint.fileno(), np.zeros(1, np.uint8)))
