"""What a worker sleeps on: one epoll instance.

The stages' descriptors are level-triggered, as a stage need not empty its own. The supervisor's wake-up and the timer
are edge-triggered, so nobody has to read them. The timer runs by itself: setting a time-out at each sleep would cost
every packet of a quiet link. It bounds how long an idle worker leaves expired flows and an old heartbeat standing.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct

from appliance import limits

_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC = 1, 0o2004000  # <sys/timerfd.h>; os.timerfd_create came with Python 3.13


def _timer(period_ns: int) -> int:
    """A timerfd that fires again and again. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC))
    period = divmod(period_ns, limits.SECOND)
    if fd < 0 or libc.timerfd_settime(fd, 0, struct.pack("=qqqq", *period, *period), None) != 0:
        raise OSError(ctypes.get_errno(), f"timerfd: {os.strerror(ctypes.get_errno())}")
    return fd


def descriptor(tun: int, wire: int, handoff: int, wake: int) -> int:
    """An epoll descriptor that is ready when a stage has work, when ``wake`` was written, and every ``limits.WAIT_NS``.

    It and its timer live as long as the process. Raises OSError.
    """
    epoll = select.epoll()
    for fd in (tun, wire, handoff):
        epoll.register(fd, select.EPOLLIN)
    for fd in (wake, _timer(limits.WAIT_NS)):
        epoll.register(fd, select.EPOLLIN | select.EPOLLET)
    kept = os.dup(epoll.fileno())
    epoll.close()
    return kept
