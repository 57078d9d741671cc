"""What a worker sleeps on: one epoll instance.

The stages' descriptors are level-triggered, as a stage need not empty its own. The supervisor's wake-up is
edge-triggered, so nobody has to read it. The timer runs by itself: setting a time-out at each sleep would cost every
packet of a quiet link. It bounds how long an idle worker leaves expired flows, packets that waited too long and an old
heartbeat standing. The worker reads it: the kernel starts its next period only then (``fs/timerfd.c``).
"""

from __future__ import annotations

import ctypes
import os
import select
import struct

from appliance import limits

_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC = 1, 0o2004000  # <sys/timerfd.h>; os.timerfd_create came with Python 3.13


def timer(period_ns: int = limits.WAIT_NS) -> int:
    """A timerfd that fires a period after it was read, again and again. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC))
    period = divmod(period_ns, limits.SECOND)
    if fd < 0 or libc.timerfd_settime(fd, 0, struct.pack("=qqqq", *period, *period), None) != 0:
        raise OSError(ctypes.get_errno(), f"timerfd: {os.strerror(ctypes.get_errno())}")
    return fd


def descriptor(tun: int, wire: int, handoff: int, wake: int, timer: int) -> int:
    """An epoll descriptor that is ready when a stage has work, when ``wake`` was written, and when the timer fired.

    It lives as long as the process. Raises OSError.
    """
    epoll = select.epoll()
    for fd in (tun, wire, handoff, timer):
        epoll.register(fd, select.EPOLLIN)
    epoll.register(wake, select.EPOLLIN | select.EPOLLET)
    kept = os.dup(epoll.fileno())
    epoll.close()
    return kept
