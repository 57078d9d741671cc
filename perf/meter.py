"""Processor time and memory, from /proc.

A worker's time includes what the kernel does in its system calls, packet processing up to the receiving
socket included. What the kernel does elsewhere (`direct`, `vxlan`) shows only in the machine's time, which
also has the load generators and whatever else runs: compare it between systems, and measure on a quiet
machine."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
"""Clock ticks a second, the unit of /proc/stat and /proc/PID/stat."""
BUSY = (0, 1, 2, 5, 6)
"""user, nice, system, irq and softirq of the line `cpu` in /proc/stat; user has the guests' time in it."""
STEAL = 7


@dataclass
class Used:
    """Processor seconds used while a block ran.

    `processes` is None where none were watched; `stolen` is what the hypervisor gave to other machines.
    """

    processes: float | None = None
    machine: float = 0.0
    stolen: float = 0.0


@contextmanager
def metered(pids: Iterable[int]) -> Iterator[Used]:
    """Fills in, when the block ends, what the processes and the whole machine used.

    Raises FileNotFoundError if a process has ended.
    """
    used, watched = Used(), list(pids)
    processes, (busy, stolen) = processor_s(watched), _machine()
    yield used
    if watched:
        used.processes = processor_s(watched) - processes
    after = _machine()
    used.machine, used.stolen = after[0] - busy, after[1] - stolen


def busy_percent(seconds: float = 1.0) -> float:
    """How much of the machine's processor time is used while nothing is measured, over so many seconds."""
    with metered(()) as used:
        time.sleep(seconds)
    return 100 * used.machine / (seconds * (os.cpu_count() or 1))


def processor_s(pids: Iterable[int]) -> float:
    """Processor seconds of processes so far, all their threads, without their children. Raises FileNotFoundError."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])  # utime, stime: fields 14 and 15 of proc(5)
    return total / TICKS


def _machine() -> tuple[float, float]:
    """Busy and stolen processor seconds of the machine so far."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return sum(fields[index] for index in BUSY) / TICKS, fields[STEAL] / TICKS


def pss_mib(pid: int) -> float:
    """A process's memory, pages shared with others counted in part (PSS), in MiB. Raises OSError."""
    return sum(_rollup(pid, "Pss"))


def own_and_shared_mib(pid: int) -> tuple[float, float]:
    """The same without the pages of files, as those of a library fall when whoever else uses it starts: anonymous
    pages, and those of memory that processes share. Raises OSError."""
    own, shared = _rollup(pid, "Pss_Anon", "Pss_Shmem")
    return own, shared


def _rollup(pid: int, *names: str) -> list[float]:
    """MiB of some lines of a process's smaps_rollup (proc(5)). Raises OSError."""
    path = Path(f"/proc/{pid}/smaps_rollup")
    found = dict(line.split(":", 1) for line in path.read_text().splitlines()[1:])
    if missing := [it for it in names if it not in found]:
        raise OSError(f"{path}: expected lines {', '.join(missing)}")
    return [int(found[it].split()[0]) / 1024 for it in names]
