"""Small UDP packets as fast as they go or at a rate, and a sink that counts them.

The generator never waits for the network: it offers what one core can send, or so many a second, and the sink counts
what the system carried. The sink's time runs from its first packet to its last, so that neither start nor drain
matter.

Each packet has its flow, its number in that flow, and when its batch was handed to the kernel. Both ends of a load
share a machine, hence a clock: the sink has the latency of every packet, with the wait in its own socket buffer. A
packet is reordered if one of its flow with a larger number was there before it (RFC 4737)."""

import socket
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from perf.load import histogram
from perf.load.histogram import record
from perf.load.native import (
    MSG_WAITFORONE,
    NOWHERE,
    SECOND,
    Batch,
    compiled,
    monotonic,
    recvmmsg,
    sendmmsg,
    wait_until,
)
from perf.load.sockets import WAIT, bound, connected, limit

BATCH = 32
"""Messages a system call of one flow: more gains nothing, and a call floods no queue on the way (1,000 packets)."""
BATCH_S = 50e-6
"""Seconds between two batches at most, if a rate is given."""
FLOW, NUMBER, TIME = range(3)
"""Words at the beginning of a payload."""
HEADER = 24
"""Bytes of these words."""
FLOWS_MAX = 1024
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
    reordered: int = 0
    latency: dict[str, float] = field(default_factory=dict)


@compiled
def _generate(
    handles: NDArray[np.int32], messages: NDArray[Any], words: NDArray[np.int64], duration: int, gap: int
) -> tuple[int, int, int]:
    """Sends batches for `duration` ns, one each `gap` ns, from each socket in turn: packets sent, packets refused, ns.

    A batch that could not leave in time leaves at once, and those after it until the schedule is met.
    """
    clock = np.zeros(2, np.int64)
    numbers = np.zeros(len(handles), np.int64)
    begin = now = due = monotonic(clock)
    sent = refused = turn = 0
    while now - begin < duration:
        if gap:
            now = wait_until(due, clock)
            due += gap
        for i in range(len(messages)):
            words[i, FLOW], words[i, NUMBER], words[i, TIME] = turn, numbers[turn] + i, now
        done = max(0, sendmmsg(handles[turn], messages.ctypes.data, len(messages), 0))
        numbers[turn] += done
        sent += done
        refused += len(messages) - done
        turn = (turn + 1) % len(handles)
        now = monotonic(clock)
    return sent, refused, now - begin


@compiled
def _count(
    handle: int, messages: NDArray[Any], words: NDArray[np.int64], times: NDArray[np.int64], patience: int
) -> tuple[int, int, int]:
    """Receives until a call times out after the first packet, or `patience` ns without one: packets, those of them
    that were reordered, ns. Their latencies into the histogram."""
    clock = np.zeros(2, np.int64)
    expected = np.zeros(FLOWS_MAX, np.int64)
    begin = now = monotonic(clock)
    received = reordered = first = last = 0
    while True:
        done = recvmmsg(handle, messages.ctypes.data, len(messages), MSG_WAITFORONE, 0)
        now = monotonic(clock)
        if done > 0:
            first = first if received else now
            last = now
            received += done
            for i in range(done):
                flow, number = words[i, FLOW] % FLOWS_MAX, words[i, NUMBER]
                reordered += number < expected[flow]
                expected[flow] = max(expected[flow], number + 1)
                record(times, now - words[i, TIME])
        elif received or now - begin > patience:
            return received, reordered, last - first


class Generator:
    """Sockets of as many flows, the loop compiled. Flows take turns, with fewer packets a turn the more they are."""

    def __init__(self, address: str, port: int, flows: int = 1) -> None:
        """Raises OSError."""
        if not 1 <= flows <= FLOWS_MAX:
            raise ValueError(f"flows: expected 1 to {FLOWS_MAX}, got {flows}")
        nothing = Batch(1, HEADER)
        _generate(np.full(1, NOWHERE, np.int32), nothing.messages, nothing.words, 0, 0)
        self._endpoints = [connected(socket.SOCK_DGRAM, address, port) for _ in range(flows)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for endpoint in self._endpoints:
            endpoint.close()

    def generate(self, size: int, seconds: float, rate: float = 0.0) -> Sent:
        """Sends payloads of `size` bytes, at least HEADER, for so many seconds, at `rate` packets a second; 0: as
        fast as one core can. A batch is small enough that one leaves every BATCH_S at the latest, so that a low rate
        comes in no bursts."""
        handles = np.array([endpoint.fileno() for endpoint in self._endpoints], np.int32)
        count = max(1, min(BATCH // len(handles), int(rate * BATCH_S) if rate else BATCH))
        batch = Batch(count, size)
        gap = int(count / rate * SECOND) if rate else 0
        sent, refused, duration = _generate(handles, batch.messages, batch.words, int(seconds * SECOND), gap)
        return Sent(sent, refused, duration / SECOND)


def sink(port: int) -> socket.socket:
    """The sink's socket, its loop compiled."""
    nothing = Batch(1, HEADER)
    _count(NOWHERE, nothing.messages, nothing.words, histogram.empty(), -1)
    endpoint = bound(socket.SOCK_DGRAM, port)
    endpoint.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, SINK_BUFFER)
    limit(endpoint, IDLE)
    return endpoint


def count(endpoint: socket.socket) -> Received:
    """Counts what arrives until nothing more does."""
    batch = Batch(4 * BATCH, SINK_SLOT)
    times = histogram.empty()
    received, reordered, duration = _count(endpoint.fileno(), batch.messages, batch.words, times, int(WAIT * SECOND))
    return Received(received, duration / SECOND, reordered, histogram.percentiles(times))
