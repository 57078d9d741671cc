"""Which processes a supervisor started, in ``paths.runtime/processes.json``: so that whoever comes later finds them.

A process id alone means nothing once the process has ended, so the kernel's start time is beside it, and a signal is
sent through a pidfd that was opened before both were compared. Where nothing can be written there is no record.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance.supervisor.template import kill_as_its_user, process_name

log = logging.getLogger(__name__)

FILE: Final = "processes.json"
SUPERVISOR, TEMPLATE, RESOLVER = "supervisor", "template", "resolver"
ENDED_MS: Final = 5_000
"""How long a killed process may take to disappear: the kernel closes its devices first."""


def worker(index: int) -> str:
    """Under which name a worker is recorded."""
    return f"worker.{index}"


def started(pid: int) -> int:
    """When a process was started, in clock ticks since boot (proc(5)); 0 if there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


class Record:
    """The file, as it should be."""

    def __init__(self, runtime: Path) -> None:
        self._path = runtime / FILE
        self._known = read(runtime)

    def put(self, name: str, pid: int) -> None:
        """Note which process has a part."""
        self._known[name] = (pid, started(pid))
        self._write()

    def _write(self) -> None:
        beside = self._path.with_suffix(".new")
        try:
            beside.write_text(json.dumps(self._known))
            beside.replace(self._path)
        except OSError as error:
            log.debug("cannot record the processes", extra={"error": str(error)})


def read(runtime: Path) -> dict[str, tuple[int, int]]:
    """Process id and start time by part; nothing if there is no file that says so."""
    try:
        found = json.loads((runtime / FILE).read_text())
        return {str(name): (int(pid), int(since)) for name, (pid, since) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def alive(runtime: Path) -> dict[str, int]:
    """The recorded processes that live, by part."""
    return {name: pid for name, (pid, since) in read(runtime).items() if since and started(pid) == since}


def orphans(living: Mapping[str, int], kept: Collection[str]) -> dict[str, int]:
    """Which of the living processes nobody can go on with: workers whose template and supervisor are gone, unless the
    process is among the descriptors that somebody else kept, by these names. Whoever has its memory but not the process
    would start another one beside it."""
    if SUPERVISOR in living or TEMPLATE in living:
        return {}
    workers = ((name, pid) for name, pid in living.items() if name.startswith("worker."))
    return {name: pid for name, pid in workers if process_name(int(name.removeprefix("worker."))) not in kept}


def end(runtime: Path, names: Iterable[str]) -> list[str]:
    """Kill recorded processes; gives those that lived, when they are gone. Raises OSError."""
    known, ended = read(runtime), []
    for name in names:
        pid, since = known.get(name, (0, 0))
        with suppress(ProcessLookupError):
            if pid and _kill(pid, since):
                ended.append(name)
    return ended


def _kill(pid: int, since: int) -> bool:
    pidfd = os.pidfd_open(pid)
    try:
        if not since or started(pid) != since:
            return False
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except PermissionError:  # root without CAP_KILL
            kill_as_its_user(pidfd)
        return await_end(pidfd)
    finally:
        os.close(pidfd)


def await_end(pidfd: int) -> bool:
    """Wait for the end of a process that was killed; whether it came."""
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    return bool(waiting.poll(ENDED_MS))
