"""The system calls of the packet path, behind one replaceable table.

``table()`` gives the addresses of libc's own functions, in the order of the constants below. Compiled code calls
through it, so a test puts the address of a function of its own into the array and makes ``sendmsg`` return EIO, or
records what would have been sent. An indirect call costs about a nanosecond.

System calls: read, write, writev, sched_yield, sendmsg, recvmmsg, epoll_wait, clock_gettime (the latter answered by
the vDSO).
"""

import ctypes
from typing import Any

import numpy as np
from numba import njit

from appliance.dataplane.native import (
    address_of,
    call_int3,
    call_int4,
    call_int5,
    call_long3,
    call_pointer,
    int32_at,
)

READ, WRITEV, SENDMSG, RECVMMSG, WAIT, CLOCK, ERRNO, WRITE, YIELD = range(9)
_NAMES = ("read", "writev", "sendmsg", "recvmmsg", "epoll_wait", "clock_gettime", "__errno_location", "write",
"sched_yield")

EINTR, EIO, EAGAIN, EINVAL, EMSGSIZE, ENOBUFS = 4, 5, 11, 22, 90, 105
MSG_DONTWAIT = 0x40
CLOCK_MONOTONIC = 1


def table() -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Addresses of the C library's functions."""
    libc = ctypes.CDLL(None)
    addresses = [ctypes.cast(getattr(libc, name), ctypes.c_void_p).value or 0 for name in _NAMES]
    return np.array(addresses, dtype=np.int64)


@njit
def errno(libc):
    """The calling thread's errno."""
    return int32_at(call_pointer(libc[ERRNO]))


@njit
def read(libc, fd, address, length):
    """read(2): bytes read, or -1 with errno set."""
    return call_long3(libc[READ], fd, address, length)


@njit
def write(libc, fd, address, length):
    """write(2): bytes written, or -1 with errno set."""
    return call_long3(libc[WRITE], fd, address, length)


@njit
def writev(libc, fd, iov, count):
    """writev(2): bytes written, or -1 with errno set."""
    return call_long3(libc[WRITEV], fd, iov, count)


@njit
def sendmsg(libc, fd, message):
    """sendmsg(2), never blocking: bytes sent, or -1 with errno set."""
    return call_long3(libc[SENDMSG], fd, message, MSG_DONTWAIT)


@njit
def recvmmsg(libc, fd, messages, count):
    """recvmmsg(2), never blocking: messages received, or -1 with errno set."""
    return call_int5(libc[RECVMMSG], fd, messages, count, MSG_DONTWAIT, 0)


@njit
def wait(libc, epoll, events, count, milliseconds):
    """epoll_wait(2): number of ready descriptors, or -1 with errno set. ``milliseconds``: -1 waits for ever."""
    return call_int4(libc[WAIT], epoll, events, count, milliseconds)


@njit
def give_way(libc):
    """sched_yield(2): let whoever else is ready on this CPU run."""
    return call_int3(libc[YIELD], 0, 0, 0)


@njit
def monotonic(libc, scratch):
    """CLOCK_MONOTONIC in nanoseconds; ``scratch`` is an int64 array of at least two words."""
    call_int3(libc[CLOCK], CLOCK_MONOTONIC, address_of(scratch, 0), 0)
    return scratch[0] * 1_000_000_000 + scratch[1]
