"""Small UDP packets as fast as they go, and a sink that counts them.

The generator never waits for the network: it offers what one core can send, and the sink counts what the
system carried. The sink's time runs from its first packet to its last, so that neither start nor drain
matter."""

import socket
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from perf.load.native import (
    MSG_WAITFORONE,
    NOWHERE,
    SECOND,
    Batch,
    compiled,
    monotonic,
    recvmmsg,
    sendmmsg,
)
from perf.load.sockets import WAIT, bound, connected, limit

BATCH = 32
"""Messages a system call of one flow: more gains nothing, and a call floods no queue on the way (1,000 packets)."""
SINK_BUFFER = 8 << 20
"""Bytes of the sink's socket buffer: what is lost is lost on the way, not here."""
SINK_SLOT = 2048
"""Bytes for a packet at the sink, more than any MTU here."""
SO_RCVBUFFORCE = 33
"""socket(7); Python's module lacks it. Root may exceed net.core.rmem_max."""
IDLE = 0.4
"""Seconds without a packet after which the sink has seen them all."""


@dataclass(frozen=True)
class Sent:
    """What the generator offered: packets that the kernel took, packets that it refused, and the time."""

    packets: int
    refused: int
    seconds: float


@dataclass(frozen=True)
class Received:
    """What arrived: packets, and seconds between the first and the last."""

    packets: int
    seconds: float


@compiled
def _generate(handles: NDArray[np.int32], messages: NDArray[Any], duration: int) -> tuple[int, int, int]:
    """Sends batches for `duration` ns, from each socket in turn: packets sent, packets refused, ns."""
    clock = np.zeros(2, np.int64)
    begin = now = monotonic(clock)
    sent = refused = turn = 0
    while now - begin < duration:
        done = max(0, sendmmsg(handles[turn], messages.ctypes.data, len(messages), 0))
        sent += done
        refused += len(messages) - done
        turn = (turn + 1) % len(handles)
        now = monotonic(clock)
    return sent, refused, now - begin


@compiled
def _count(handle: int, messages: NDArray[Any], patience: int) -> tuple[int, int]:
    """Receives until a call times out after the first packet, or `patience` ns without one: packets, ns."""
    clock = np.zeros(2, np.int64)
    begin = now = monotonic(clock)
    received = first = last = 0
    while True:
        done = recvmmsg(handle, messages.ctypes.data, len(messages), MSG_WAITFORONE, 0)
        now = monotonic(clock)
        if done > 0:
            first = first if received else now
            last = now
            received += done
        elif received or now - begin > patience:
            return received, last - first


class Generator:
    """Sockets of as many flows, the loop compiled. Flows take turns, with fewer packets a turn the more they are."""

    def __init__(self, address: str, port: int, flows: int = 1) -> None:
        """Raises OSError."""
        _generate(np.full(1, NOWHERE, np.int32), Batch(1, 1).messages, 0)
        self._endpoints = [connected(socket.SOCK_DGRAM, address, port) for _ in range(flows)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for endpoint in self._endpoints:
            endpoint.close()

    def generate(self, size: int, seconds: float) -> Sent:
        """Sends payloads of `size` bytes for so many seconds."""
        handles = np.array([endpoint.fileno() for endpoint in self._endpoints], np.int32)
        batch = Batch(max(1, BATCH // len(handles)), size)
        sent, refused, duration = _generate(handles, batch.messages, int(seconds * SECOND))
        return Sent(sent, refused, duration / SECOND)


def sink(port: int) -> socket.socket:
    """The sink's socket, its loop compiled."""
    _count(NOWHERE, Batch(1, 1).messages, -1)
    endpoint = bound(socket.SOCK_DGRAM, port)
    endpoint.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, SINK_BUFFER)
    limit(endpoint, IDLE)
    return endpoint


def count(endpoint: socket.socket) -> Received:
    """Counts what arrives until nothing more does."""
    batch = Batch(4 * BATCH, SINK_SLOT)
    received, duration = _count(endpoint.fileno(), batch.messages, int(WAIT * SECOND))
    return Received(received, duration / SECOND)
