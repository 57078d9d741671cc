"""Processes of a lab: started in a namespace, recognised later, ended for certain.

Theory of operation
-------------------
A process that `start` starts gets a session of its own, so that it outlives the command that started it, and
a record file with its process id, its start time and its command line. A process id alone means nothing after
the process has ended: another one may have it. So a record is believed only if all three still agree, and a
signal is sent through a pidfd that was opened before they were compared.

A record is written after the process exists, and what a process forks has none: after a kill at the wrong
moment there are processes without records. `members` finds them: they are in a namespace of the lab *and*
carry MARKER with the lab's name in their environment, which they have from `environment`. A shell that
somebody moved into a lab's namespace by other means is left alone, and `strangers` reports it.
"""

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from appliance.lab.plan import namespace_path

MARKER = "APPLIANCE_LAB"
"""Environment variable that names the lab to which a process belongs; `appliance lab` reads it as --lab."""
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals on which a command undoes what it has begun."""
GRACE_S = 5.0
"""Seconds from SIGTERM to SIGKILL; a supervisor gives its workers two."""
KILLED_S = 5.0
"""Seconds that a killed process may take to disappear: the kernel closes its devices first."""


@dataclass(frozen=True)
class Process:
    """A process for certain: `started` is the kernel's start time in clock ticks since boot (proc(5))."""

    pid: int
    started: int
    command: tuple[str, ...]


def running(pid: int) -> Process | None:
    """The process that has a process id now; None if there is none or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    state, started = fields[0], int(fields[19])
    command = tuple(os.fsdecode(part) for part in raw.split(b"\0")[:-1])
    return None if state in "ZX" else Process(pid, started, command)


def alive(record: Process) -> bool:
    """Whether a record still means a living process."""
    return _is(record, running(record.pid))


def _is(record: Process, found: Process | None) -> bool:
    """Whether a record and a process are the same.

    For a moment after `start` the command is preceded by `ip netns exec`; while the kernel replaces one
    program by the other there is none.
    """
    if found is None or found.started != record.started:
        return False
    return not found.command or found.command[-len(record.command) :] == record.command


def inside(namespace: str, command: Sequence[str]) -> list[str]:
    """A command line that runs a command in a namespace, with the namespace's own /sys."""
    return ["ip", "netns", "exec", namespace, *command]


def environment(lab: str) -> dict[str, str]:
    """The environment for a process of a lab: ours, marked as the lab's."""
    return {**os.environ, MARKER: lab}


def start(lab: str, namespace: str, command: Sequence[str], log: Path, record: Path) -> Process:
    """Starts a process that outlives us; appends its output to `log`, writes `record`. Raises OSError."""
    with log.open("ab") as output, undisturbed():
        child = subprocess.Popen(
            inside(namespace, command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment(lab),
        )
        found = running(child.pid)
        process = Process(child.pid, found.started if found else 0, tuple(command))
        record.write_text(json.dumps(asdict(process)))
    return process


@contextmanager
def undisturbed() -> Iterator[None]:
    """Holds back what may interrupt us, so that nothing is started without a record, or outlives our interest in it.

    Handlers are exchanged and signals not blocked, since a new process would have them blocked too. Threads
    other than the main one are never interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {it: signal.signal(it, lambda number, _: held.append(number)) for it in INTERRUPTS}
    try:
        yield
    finally:
        for it, handler in handlers.items():
            signal.signal(it, handler)
    for number in held:
        signal.raise_signal(number)


def recorded(record: Path) -> Process | None:
    """The process of a record file, whether it lives or not; None for a record that was never completed."""
    try:
        data = json.loads(record.read_text())
        return Process(int(data["pid"]), int(data["started"]), tuple(data["command"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def members(lab: str, namespaces: Iterable[str]) -> list[Process]:
    """Processes that belong to a lab: in one of its namespaces and marked with its name."""
    mark = os.fsencode(f"{MARKER}={lab}")
    return [it for it in _dwellers(namespaces) if mark in _environment(it.pid)]


def strangers(lab: str, namespaces: Iterable[str]) -> list[Process]:
    """Processes in a lab's namespaces that the lab did not start."""
    mark = os.fsencode(f"{MARKER}={lab}")
    return [it for it in _dwellers(namespaces) if mark not in _environment(it.pid)]


def _dwellers(namespaces: Iterable[str]) -> Iterator[Process]:
    """Every process in one of the namespaces, but for this one: `down` may be typed in a container's shell."""
    inodes = {inode for name in namespaces if (inode := _inode(namespace_path(name)))}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        if _inode(entry / "ns/net") in inodes and (found := running(int(entry.name))):
            yield found


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def kill(processes: Iterable[Process]) -> None:
    """Ends what still lives of the processes by SIGKILL. Returns when they are gone, at the latest after KILLED_S."""
    handles = dict(_handles(processes))
    try:
        _signal(handles, signal.SIGKILL)
        _wait(handles, KILLED_S)
    finally:
        for handle in handles:
            os.close(handle)


def stop(processes: Iterable[Process], grace: float = GRACE_S) -> None:
    """Ends what still lives of the processes: SIGTERM, then SIGKILL to what is left after `grace` seconds.

    Returns when they are gone, at the latest KILLED_S after the last signal.
    """
    handles = dict(_handles(processes))
    try:
        _signal(handles, signal.SIGTERM)
        left = _wait(handles, grace)
        _signal(left, signal.SIGKILL)
        _wait(left, KILLED_S)
    finally:
        for handle in handles:
            os.close(handle)


def _handles(processes: Iterable[Process]) -> Iterator[tuple[int, Process]]:
    """A pidfd for each process that is still the one meant: opened first, compared then."""
    for process in processes:
        try:
            handle = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        if alive(process):
            yield handle, process
        else:
            os.close(handle)


def _signal(handles: Mapping[int, Process], number: signal.Signals) -> None:
    for handle in handles:
        try:
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            continue


def _wait(handles: Mapping[int, Process], seconds: float) -> dict[int, Process]:
    """Waits until all have ended, or the time is up; those that have not."""
    left = dict(handles)
    poll = select.poll()
    for handle in left:
        poll.register(handle, select.POLLIN)  # a pidfd is readable once its process has ended
    deadline = time.monotonic() + seconds
    while left and (rest := deadline - time.monotonic()) > 0:
        for handle, _ in poll.poll(rest * 1000):
            poll.unregister(handle)
            del left[handle]
    return left
