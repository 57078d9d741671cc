"""The C library called from compiled code, and the layouts of its structures on 64-bit Linux.

Constants and layouts are from linux/socket.h and socket(7); `recvmmsg` and `sendmmsg` move a batch of
messages in one system call, so that a generator of small packets is not what a measurement measures."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])

MSG_WAITFORONE = 0x10000
NOWHERE = -1
"""No descriptor: every call fails at once, so a loop is compiled without being run."""
CLOCK_MONOTONIC = 1
TIMER_ABSTIME = 1
NAME = 28
"""Bytes of struct sockaddr_in6 (ipv6(7))."""
SPIN = 80_000
"""Nanoseconds before a moment from which one waits awake: a timer is late by 50 µs and the wake-up (prctl(2))."""
SECOND = 1_000_000_000
"""In nanoseconds, the unit of every time in compiled code."""

IOVEC = np.dtype([("base", np.uint64), ("length", np.uint64)])
MESSAGE = np.dtype(
    [
        ("name", np.uint64),
        ("name_length", np.uint64),
        ("iov", np.uint64),
        ("iov_count", np.uint64),
        ("control", np.uint64),
        ("control_length", np.uint64),
        ("flags", np.uint64),
        ("length", np.uint64),
    ]
)
"""struct mmsghdr; 32-bit members are widened by their padding, which the kernel ignores or leaves zero."""

sendmmsg = types.ExternalFunction("sendmmsg", types.int32(types.int32, types.uint64, types.uint32, types.int32))
recvmmsg = types.ExternalFunction(
    "recvmmsg", types.int32(types.int32, types.uint64, types.uint32, types.int32, types.uint64)
)
send = types.ExternalFunction("send", types.int64(types.int32, types.uint64, types.uint64, types.int32))
recv = types.ExternalFunction("recv", types.int64(types.int32, types.uint64, types.uint64, types.int32))
connect = types.ExternalFunction("connect", types.int32(types.int32, types.uint64, types.uint32))
accept = types.ExternalFunction("accept", types.int32(types.int32, types.uint64, types.uint64))
open_socket = types.ExternalFunction("socket", types.int32(types.int32, types.int32, types.int32))
set_option = types.ExternalFunction(
    "setsockopt", types.int32(types.int32, types.int32, types.int32, types.uint64, types.uint32)
)
close = types.ExternalFunction("close", types.int32(types.int32))
_clock_nanosleep = types.ExternalFunction(
    "clock_nanosleep", types.int32(types.int32, types.int32, types.uint64, types.uint64)
)
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uint64))


def compiled(function: Function) -> Function:
    """The function as machine code, compiled once a machine; its Python type stays visible."""
    return cast(Function, numba.njit(cache=True, nogil=True)(function))


@compiled
def monotonic(scratch: NDArray[np.int64]) -> int:
    """CLOCK_MONOTONIC in nanoseconds; `scratch` is a timespec."""
    _clock_gettime(CLOCK_MONOTONIC, scratch.ctypes.data)
    return int(scratch[0] * SECOND + scratch[1])


@compiled
def wait_until(moment: int, scratch: NDArray[np.int64], awake: int = SPIN) -> int:
    """Waits until a moment of CLOCK_MONOTONIC, asleep but for the last `awake` ns; the time then."""
    now = monotonic(scratch)
    if moment - now > awake:
        early = moment - awake
        scratch[0], scratch[1] = early // SECOND, early % SECOND
        _clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, scratch.ctypes.data, 0)
        now = monotonic(scratch)
    while now < moment:
        now = monotonic(scratch)
    return now


class Batch:
    """`count` messages that each point to `size` bytes of their own. Keep it while compiled code uses
    `messages`."""

    def __init__(self, count: int, size: int, *, names: bool = False) -> None:
        """`names`: with room for the peer's address, as a received message leaves it and an answer needs it."""
        self.words = np.zeros((count, -(-size // 8)), np.int64)
        """The payloads, as words."""
        self._iovecs = np.zeros(count, IOVEC)
        self._iovecs["base"] = addresses(self.words)
        self._iovecs["length"] = size
        self.messages = np.zeros(count, MESSAGE)
        self.messages["iov"] = addresses(self._iovecs)
        self.messages["iov_count"] = 1
        if names:
            self._names = np.zeros((count, NAME), np.uint8)
            self.messages["name"], self.messages["name_length"] = addresses(self._names), NAME


def addresses(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """The memory address of each row of a contiguous array."""
    return np.uint64(rows.ctypes.data) + np.arange(len(rows), dtype=np.uint64) * np.uint64(rows.strides[0])
