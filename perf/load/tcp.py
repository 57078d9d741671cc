"""One byte there and one byte back over TCP, one exchange at a time: the round trip as an application sees
it.

Closed loop: the next byte leaves when the answer has come, so a stall delays one exchange and is counted
once. Every round trip is kept, so percentiles are exact."""

import socket
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perf.load.native import NOWHERE, SECOND, compiled, monotonic, recv, send
from perf.load.sockets import WAIT, bound, connected, limit

CONNECTIONS = 16
"""One after the other, each for its share of the time: where a flow is handled depends on its ports, and the
median of many flows does not depend on the luck of one."""
SAMPLES = 1 << 18
"""Round trips kept of a connection at most; its exchange ends when there is no room for more."""
START = 60.0
"""Seconds that the server waits for its client, whose first start on a machine compiles."""
WARM_UP = 0.02
"""Seconds of exchanges before those that count: caches, flow entries and neighbours are there by then."""
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 100.0)


@dataclass(frozen=True)
class Exchanged:
    """Round trips made, the seconds they took, and their percentiles in µs."""

    exchanges: int
    seconds: float
    percentiles: dict[str, float]


@dataclass(frozen=True)
class Echoed:
    """Bytes that the server returned."""

    exchanges: int


@compiled
def _exchange(handle: int, round_trips: NDArray[np.int64], duration: int) -> int:
    """Exchanges bytes for `duration` ns, each round trip in ns into the array: how many, or -1 if one
    failed."""
    clock = np.zeros(2, np.int64)
    byte = np.zeros(1, np.uint8)
    begin = before = monotonic(clock)
    for index in range(len(round_trips)):
        if before - begin >= duration:
            return index
        if send(handle, byte.ctypes.data, 1, 0) != 1 or recv(handle, byte.ctypes.data, 1, 0) != 1:
            return -1
        now = monotonic(clock)
        round_trips[index] = now - before
        before = now
    return len(round_trips)


@compiled
def _echo(handle: int, byte: NDArray[np.uint8]) -> int:
    """Returns each byte until the peer closes: how many."""
    echoed = 0
    while recv(handle, byte.ctypes.data, 1, 0) == 1 and send(handle, byte.ctypes.data, 1, 0) == 1:
        echoed += 1
    return echoed


@dataclass(frozen=True)
class Client:
    """Where the server is."""

    address: str
    port: int

    def exchange(self, seconds: float) -> Exchanged:
        """Exchanges one byte at a time, over one connection after the other. Raises OSError."""
        share = seconds / CONNECTIONS - WARM_UP
        return summary(np.concatenate([self._connection(share) for _ in range(CONNECTIONS)]))

    def _connection(self, seconds: float) -> NDArray[np.int64]:
        """Round trips of one connection in ns, those of the warm-up left out."""
        with connected(socket.SOCK_STREAM, self.address, self.port) as endpoint:
            endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _round_trips(endpoint, WARM_UP)
            return _round_trips(endpoint, seconds)


def client(address: str, port: int) -> Client:
    """A client whose loop is compiled."""
    _exchange(NOWHERE, np.zeros(1, np.int64), 1)
    return Client(address, port)


def _round_trips(endpoint: socket.socket, seconds: float) -> NDArray[np.int64]:
    """Round trips in ns. Raises OSError."""
    round_trips = np.zeros(SAMPLES, np.int64)
    count = _exchange(endpoint.fileno(), round_trips, int(seconds * SECOND))
    if count <= 0:
        raise OSError(f"expected an answer within {WAIT:g} s to each byte")
    return round_trips[:count]


def summary(round_trips: NDArray[np.int64]) -> Exchanged:
    """Round trips in ns, at least one, as a result."""
    values = np.percentile(round_trips / 1e3, PERCENTILES)
    percentiles = {f"p{rank:g}": round(float(value), 2) for rank, value in zip(PERCENTILES, values, strict=True)}
    return Exchanged(len(round_trips), float(round_trips.sum()) / SECOND, percentiles)


def server(port: int) -> socket.socket:
    """A listening socket, the echo loop compiled."""
    _echo(NOWHERE, np.zeros(1, np.uint8))
    endpoint = bound(socket.SOCK_STREAM, port)
    endpoint.listen(CONNECTIONS)
    return endpoint


def echo(endpoint: socket.socket) -> Echoed:
    """Serves the connections of one client. Raises OSError, TimeoutError without a client."""
    endpoint.settimeout(START)
    return Echoed(sum(_serve(endpoint) for _ in range(CONNECTIONS)))


def _serve(endpoint: socket.socket) -> int:
    """Echoes to the next connection until it ends: bytes."""
    peer, _address = endpoint.accept()
    with peer:
        peer.setblocking(True)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit(peer, WAIT)
        return _echo(peer.fileno(), np.zeros(1, np.uint8))
