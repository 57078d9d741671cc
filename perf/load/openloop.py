"""Requests and responses over UDP with open-loop arrival: what a service sees whose clients do not wait for one
another.

Requests leave when the schedule says so, whether earlier ones were answered or not, and each response is held against
the moment when its request was *to* leave. So a stall of the system is felt by all requests that arrive in it, not by
one of them as in a closed loop (coordinated omission; G. Tene, "How NOT to Measure Latency"). Gaps between arrivals
are exponential, from a fixed seed: bursts as independent clients make them, the same for every system.

With ``steady`` it is sockperf's load instead, to be held against that tool: gaps of one length, a sender that never
sleeps, on the first CPU, and a receiver on the last. All of that shows in the median: a CPU that idles between two
requests must be woken for each, and one that a sender keeps for itself is nobody else's (`perf.calibrate`).

The client sends in one thread and receives in another, both compiled and without the interpreter's lock. A request
without a response within `WAIT` after the last is lost."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perf.load import histogram
from perf.load.histogram import record
from perf.load.native import (
    MSG_WAITFORONE,
    NOWHERE,
    SECOND,
    SPIN,
    Batch,
    compiled,
    monotonic,
    recv,
    recvmmsg,
    send,
    sendmmsg,
    wait_until,
)
from perf.load.sockets import bound, connected, limit

SIZE = 64
"""Bytes of a request and of its response."""
SEED = 2544
WAIT = 0.5
"""Seconds that a response may take after the last request."""
START_NS = 20_000_000
"""From the start to the first request."""
SERVER_BATCH = 32


@dataclass(frozen=True)
class Answered:
    """Requests sent, those that were lost, percentiles of the response time and its distribution in µs, and how late
    the client itself was at the median and at the 99th percentile: what of a response time is the generator's own."""

    requests: int
    lost: int
    seconds: float
    percentiles: dict[str, float]
    curve: list[tuple[float, float]]
    late: dict[str, float]


@dataclass(frozen=True)
class Served:
    """Responses that the server sent."""

    responses: int


def schedule(rate: float, seconds: float, *, steady: bool = False) -> NDArray[np.int64]:
    """Moments of arrival in ns from the start: Poisson, `rate` a second, or steady."""
    if steady:
        return (np.arange(1, int(rate * seconds) + 1) * (SECOND / rate)).astype(np.int64)
    gaps = np.random.default_rng(SEED).exponential(1 / rate, int(rate * seconds))
    return np.cumsum(gaps * SECOND).astype(np.int64)


@compiled
def _send(handle: int, due: NDArray[np.int64], late: NDArray[np.int64], awake: int) -> int:
    """Sends request i at `due[i]`, waiting the last `awake` ns without sleep, how late into the histogram: how many the
    kernel took."""
    clock = np.zeros(2, np.int64)
    words = np.zeros(SIZE // 8, np.int64)
    sent = 0
    for index in range(len(due)):
        now = wait_until(due[index], clock, awake)
        words[0] = index
        sent += send(handle, words.ctypes.data, SIZE, 0) == SIZE
        record(late, now - due[index])
    return sent


@compiled
def _receive(handle: int, due: NDArray[np.int64], times: NDArray[np.int64], until: int) -> int:
    """Takes responses until each has come or the time is over: how many. Their times into the histogram."""
    clock = np.zeros(2, np.int64)
    words = np.zeros(SIZE // 8, np.int64)
    seen = np.zeros(len(due), np.uint8)
    received = 0
    while received < len(due):
        done = recv(handle, words.ctypes.data, SIZE, 0)
        now = monotonic(clock)
        index = words[0]
        if done == SIZE and 0 <= index < len(due) and not seen[index]:
            seen[index] = 1
            received += 1
            record(times, now - due[index])
        elif done < 0 and now > until:
            break
    return received


@compiled
def _serve(handle: int, messages: NDArray[Any]) -> int:
    """Returns each request to its sender until none comes for the socket's time-out after the first: how many."""
    served = 0
    while True:
        done = recvmmsg(handle, messages.ctypes.data, len(messages), MSG_WAITFORONE, 0)
        if done > 0:
            served += max(0, sendmmsg(handle, messages.ctypes.data, done, 0))
        elif served:
            return served
        elif handle == NOWHERE:
            return 0


def client(address: str, port: int) -> socket.socket:
    """A client's socket, its loops compiled. Raises OSError."""
    nothing = np.zeros(1, np.int64)
    _send(NOWHERE, nothing, histogram.empty(), 0)
    _receive(NOWHERE, nothing, histogram.empty(), 0)
    endpoint = connected(socket.SOCK_DGRAM, address, port)
    limit(endpoint, 0.05)
    return endpoint


def ask(endpoint: socket.socket, rate: float, seconds: float, *, steady: bool = False) -> Answered:
    """Sends requests at a rate for so many seconds, and takes the responses."""
    awake, cpus = SECOND if steady else SPIN, sorted(os.sched_getaffinity(0))
    due = schedule(rate, seconds, steady=steady) + monotonic(np.zeros(2, np.int64)) + START_NS
    times, late, sent = histogram.empty(), histogram.empty(), [0]
    until = int(due[-1] + WAIT * SECOND)

    def send_all() -> None:
        if steady:
            os.sched_setaffinity(0, cpus[:1])  # this thread's alone
        sent[0] = _send(endpoint.fileno(), due, late, awake)

    thread = threading.Thread(target=send_all)
    thread.start()
    if steady:
        os.sched_setaffinity(0, cpus[-1:])
    received = _receive(endpoint.fileno(), due, times, until)
    thread.join()
    os.sched_setaffinity(0, cpus)
    return Answered(
        requests=len(due),
        lost=len(due) - received,
        seconds=seconds,
        percentiles=histogram.percentiles(times),
        curve=histogram.curve(times),
        late=histogram.percentiles(late, (50.0, 99.0)),
    )


def server(port: int) -> socket.socket:
    """A server's socket, its loop compiled."""
    _serve(NOWHERE, _batch().messages)
    endpoint = bound(socket.SOCK_DGRAM, port)
    limit(endpoint, 2 * WAIT)
    return endpoint


def _batch() -> Batch:
    """Messages with room for the sender's address."""
    return Batch(SERVER_BATCH, SIZE, names=True)


def serve(endpoint: socket.socket) -> Served:
    """Answers one client."""
    batch = _batch()
    return Served(_serve(endpoint.fileno(), batch.messages))
