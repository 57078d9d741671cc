"""read(2) and recvmmsg(2) that waste time for each packet. Compiled, as what they replace is."""

import numpy as np
from numba import cfunc, njit, types

PACKET = 1400
"""Bytes of a super-packet that count as a packet."""
SPIN_NS = 5_000
ENTRIES = 65_536

_read = types.ExternalFunction("read", types.int64(types.int32, types.uint64, types.uint64))
_recvmmsg = types.ExternalFunction(
    "recvmmsg", types.int32(types.int32, types.uint64, types.uint32, types.int32, types.uint64)
)
_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uint64))
READ = types.int64(types.int64, types.int64, types.int64)
RECVMMSG = types.int32(types.int64, types.int64, types.int64, types.int64, types.int64)


@njit
def _now():
    time = np.empty(2, np.int64)
    _clock(1, time.ctypes.data)
    return time[0] * 1_000_000_000 + time[1]


@njit
def _spin(octets):
    until = _now() + SPIN_NS * (1 + octets // PACKET)
    while _now() < until:
        pass


@njit
def _scan(octets):
    table = np.arange(ENTRIES)
    for _ in range(1 + octets // PACKET):
        found = -1
        for i in range(ENTRIES):
            if table[i] == octets + ENTRIES:
                found = i
        table[0] = found


def calls(kind: str) -> tuple[int, int]:
    """Addresses of both calls, wasting time in the given way."""
    waste = {"spin": _spin, "scan": _scan}[kind]

    @cfunc(READ)
    def read(fd, address, length):
        got = _read(fd, address, length)
        if got > 0:
            waste(got)
        return got

    @cfunc(RECVMMSG)
    def recvmmsg(fd, messages, count, flags, timeout):
        got = _recvmmsg(fd, messages, count, flags, timeout)
        for _ in range(got):
            waste(0)
        return got

    _KEPT.extend((read, recvmmsg))
    return int(read.address), int(recvmmsg.address)


_KEPT: list[object] = []
"""Machine code must not be collected while the table has its address."""
