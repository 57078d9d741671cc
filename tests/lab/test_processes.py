"""Ending exactly the processes of a lab, with real processes in real namespaces."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import netns

from appliance.lab import processes
from appliance.lab.processes import MARKER, Process

pytestmark = pytest.mark.root

LAB = f"tp{os.getpid()}"
NAMESPACE = f"{LAB}-node1"
SLEEP = ["sleep", "1000"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal,time; signal.signal(15, 1); print(1, flush=True); time.sleep(1000)",
]


@pytest.fixture
def namespace() -> Iterator[str]:
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    yield NAMESPACE
    found = [*processes.members(LAB, [NAMESPACE]), *processes.strangers(LAB, [NAMESPACE])]
    processes.stop(found, grace=0)
    netns.remove(NAMESPACE)


def start(tmp_path: Path, command: list[str], name: str = "it") -> Process:
    return processes.start(LAB, NAMESPACE, command, tmp_path / f"{name}.log", tmp_path / f"{name}.pid")


def until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_a_started_process_is_in_the_namespace_and_in_its_own_session(namespace: str, tmp_path: Path) -> None:
    process = start(tmp_path, SLEEP)
    until(lambda: processes.running(process.pid) == process)
    assert processes.recorded(tmp_path / "it.pid") == process
    assert os.getsid(process.pid) == process.pid
    assert Path(f"/proc/{process.pid}/ns/net").samefile(f"/run/netns/{namespace}")


def test_a_record_stays_true_while_the_command_is_exec_ed(namespace: str, tmp_path: Path) -> None:
    """`ip netns exec` replaces itself by the command: the record must be right before, while and after."""
    process = start(tmp_path, SLEEP)
    for _ in range(200):
        assert processes.alive(process)


def test_an_interrupt_waits_until_the_record_is_written(namespace: str, tmp_path: Path) -> None:
    """Whenever it comes: a process that is started has a record."""
    for delay_us in range(500, 6000, 500):
        signal.setitimer(signal.ITIMER_REAL, delay_us / 1e6)
        previous = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the interrupt comes in either of the two
                start(tmp_path, SLEEP)
                time.sleep(1)
        finally:
            signal.signal(signal.SIGALRM, previous)
        record = processes.recorded(tmp_path / "it.pid")
        members = processes.members(LAB, [namespace])
        assert members == [] or record is not None
        if record is not None:
            processes.stop([record])
            (tmp_path / "it.pid").unlink()
        assert processes.members(LAB, [namespace]) == []


def test_stop_ends_processes_and_returns_when_they_are_gone(namespace: str, tmp_path: Path) -> None:
    started = [start(tmp_path, SLEEP, str(n)) for n in range(3)]
    processes.stop(started)
    assert not any(map(processes.alive, started))


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(namespace: str, tmp_path: Path) -> None:
    process = start(tmp_path, STUBBORN)
    until(lambda: (tmp_path / "it.log").read_text())
    began = time.monotonic()
    processes.stop([process], grace=0.3)
    assert 0.3 <= time.monotonic() - began < 2
    assert not processes.alive(process)


@pytest.mark.parametrize("change", [{"started": 1}, {"command": ("sleep", "999")}])
def test_a_record_of_another_process_with_the_same_id_is_not_believed(
    namespace: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    process = start(tmp_path, SLEEP)
    stale = replace(process, **change)
    assert not processes.alive(stale)
    processes.stop([stale], grace=0)
    assert processes.alive(process)


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    until(lambda: processes.running(child.pid) is None)
    assert Path(f"/proc/{child.pid}").exists()
    child.wait()


def test_what_a_process_leaves_behind_is_found_by_namespace_and_mark(namespace: str, tmp_path: Path) -> None:
    """A supervisor that is killed leaves workers; they have no record."""
    parent = start(tmp_path, ["sh", "-c", "sleep 1000 & sleep 1000 & wait"])
    until(lambda: len(processes.members(LAB, [namespace])) == 3)
    os.kill(parent.pid, signal.SIGKILL)
    until(lambda: not processes.alive(parent))
    orphans = processes.members(LAB, [namespace])
    assert [it.command for it in orphans] == [tuple(SLEEP)] * 2
    processes.stop(orphans)
    assert processes.members(LAB, [namespace]) == []


@pytest.mark.parametrize("mark", [None, "another", LAB + "x"], ids=["none", "another", "longer"])
def test_a_process_in_the_namespace_without_the_mark_is_a_stranger(namespace: str, mark: str | None) -> None:
    environment = {key: it for key, it in os.environ.items() if key != MARKER}
    if mark is not None:
        environment[MARKER] = mark
    stranger = subprocess.Popen(processes.inside(namespace, SLEEP), env=environment)
    try:
        until(lambda: [it.pid for it in processes.strangers(LAB, [namespace])] == [stranger.pid])
        assert processes.members(LAB, [namespace]) == []
    finally:
        stranger.kill()
        stranger.wait()


def test_a_marked_process_outside_the_namespaces_is_left_alone(namespace: str) -> None:
    outside = subprocess.Popen(SLEEP, env=processes.environment(LAB))
    try:
        assert processes.members(LAB, [namespace]) == []
    finally:
        outside.kill()
        outside.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"pid": "x", "started": 1, "command": []})])
def test_a_broken_record_is_no_record(tmp_path: Path, text: str) -> None:
    record = tmp_path / "it.pid"
    record.write_text(text)
    assert processes.recorded(record) is None
