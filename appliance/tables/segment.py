"""Sealed shared memory: named arrays on a memfd.

The creator keeps the only writable descriptor; :func:`readonly` opens the same file anew for reading, and a mapping of
that descriptor can never become writable. The size is sealed, so a reader cannot be hit by SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

# <linux/fcntl.h>; the fcntl module has them from Python 3.12 on only under other names on some builds.
F_ADD_SEALS, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 1, 2, 4

Section = tuple[str, "np.dtype[Any]", int]
Arrays = dict[str, "np.ndarray[Any, Any]"]


def _offsets(sections: Sequence[Section]) -> tuple[list[int], int]:
    offsets, end = [], 0
    for _, dtype, count in sections:
        offsets.append(end)
        end += -(-dtype.itemsize * count // 64) * 64  # arrays start on cache lines
    return offsets, end


def create(name: str, sections: Sequence[Section]) -> int:
    """A new memfd, zeroed, sealed in size, big enough for the sections. The caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)  # an unprivileged worker must not reopen its read-only descriptor for writing
    os.ftruncate(fd, _offsets(sections)[1])
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    return fd


def readonly(fd: int) -> int:
    """A descriptor of the same memory that cannot be mapped writable. The caller closes it."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def arrays(fd: int, sections: Sequence[Section], *, writable: bool) -> Arrays:
    """Map a segment and give its arrays by name. The mapping lives as long as any of them.

    Raises ValueError if the segment is not exactly as large as the sections.
    """
    offsets, size = _offsets(sections)
    actual = os.fstat(fd).st_size
    if actual != size:
        raise ValueError(f"shared segment: expected {size} bytes, got {actual}: another layout or capacity")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
    return {
        name: np.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        for (name, dtype, count), offset in zip(sections, offsets, strict=True)
    }
