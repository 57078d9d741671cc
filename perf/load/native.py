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
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uint64))


def compiled(function: Function) -> Function:
    """The function as machine code, compiled once a machine; its Python type stays visible."""
    return cast(Function, numba.njit(cache=True, nogil=True)(function))


@compiled
def monotonic(scratch: NDArray[np.int64]) -> int:
    """CLOCK_MONOTONIC in nanoseconds; `scratch` is a timespec."""
    _clock_gettime(CLOCK_MONOTONIC, scratch.ctypes.data)
    return int(scratch[0] * SECOND + scratch[1])


class Batch:
    """`count` messages that each point to `size` bytes of their own. Keep it while compiled code uses
    `messages`."""

    def __init__(self, count: int, size: int) -> None:
        self._payloads = np.zeros((count, size), np.uint8)
        self._iovecs = np.zeros(count, IOVEC)
        self._iovecs["base"] = addresses(self._payloads)
        self._iovecs["length"] = size
        self.messages = np.zeros(count, MESSAGE)
        self.messages["iov"] = addresses(self._iovecs)
        self.messages["iov_count"] = 1


def addresses(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """The memory address of each row of a contiguous array."""
    return np.uint64(rows.ctypes.data) + np.arange(len(rows), dtype=np.uint64) * np.uint64(rows.strides[0])
