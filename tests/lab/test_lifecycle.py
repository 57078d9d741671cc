"""Up, down, and all that may happen between: nothing is left, and nothing else is touched."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.lab import lifecycle
from appliance.lab.files import Files
from appliance.lab.plan import Spec
from tests.conftest import ROOT
from tests.lab.conftest import BROKEN
from tests.lab.helpers import NOTHING, leftovers, until

pytestmark = pytest.mark.root

NAME = BROKEN
SMALL = ["--nodes", "1", "--instances", "1", "--workers", "1"]


@pytest.fixture(autouse=True)
def nothing_before_and_after() -> Iterator[None]:
    assert leftovers(NAME) == NOTHING
    yield
    lifecycle.down(NAME)


def command(*arguments: str, name: str = NAME) -> list[str]:
    return [sys.executable, "-m", "appliance", "lab", "--name", name, *arguments]


def lab_command(*arguments: str, name: str = NAME) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments, name=name), capture_output=True, text=True, timeout=180, cwd=ROOT)


@contextmanager
def lab_running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    line = command(*arguments)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            yield child
        finally:
            child.kill()


def test_up_outlives_its_command_and_down_leaves_nothing() -> None:
    done = lab_command("up", *SMALL)
    assert done.returncode == 0, done.stderr
    built = lifecycle.opened(NAME)
    supervisor = built.supervisor(built.plan.nodes[0])
    assert supervisor is not None
    assert os.getsid(supervisor.pid) == supervisor.pid
    assert lab_command("down").returncode == 0
    assert leftovers(NAME) == NOTHING


STEPS = ["network:", "packet path:", "nodes:", "services:", "containers:"]


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("network:", signal.SIGINT),
        ("packet path:", signal.SIGTERM),
        ("nodes:", signal.SIGHUP),
        ("containers:", signal.SIGINT),
    ],
)
def test_an_interrupted_up_undoes_itself(step: str, number: signal.Signals) -> None:
    with lab_running("up", *SMALL) as up:
        wait_for(up, step)
        up.send_signal(number)
        assert up.wait(30) != 0
    assert leftovers(NAME) == NOTHING


@pytest.mark.parametrize("step", STEPS)
def test_down_clears_what_a_killed_up_has_left(step: str) -> None:
    kill_up_at(step)
    done = lab_command("down")
    assert done.returncode == 0, done.stderr
    assert leftovers(NAME) == NOTHING


def test_up_clears_what_a_killed_up_has_left() -> None:
    kill_up_at("containers:")
    done = lab_command("up", *SMALL)
    assert done.returncode == 0, done.stderr
    assert lab_command("exec", "client1", "--", "curl", "-sf", "10.30.30.30").returncode == 0


def kill_up_at(step: str) -> None:
    with lab_running("up", *SMALL) as up:
        wait_for(up, step)
        time.sleep(0.02)
        up.kill()
        up.wait()


def wait_for(up: subprocess.Popen[str], step: str) -> None:
    """Reads what `up` reports until it begins a step."""
    assert up.stderr is not None
    assert any(line.startswith(step) for line in up.stderr), f"never said {step!r}"


def test_down_without_its_files_still_finds_everything() -> None:
    """As after somebody has cleared /run: no record is left, only names and marks."""
    lifecycle.up(Spec(NAME, nodes=1, instances=1, workers=(1,)))
    directory = Files(NAME).directory

    def cleared() -> bool:  # a supervisor writes there meanwhile
        shutil.rmtree(directory, ignore_errors=True)
        return not directory.exists()

    until(cleared, "no file is left")
    assert leftovers(NAME)["processes"]
    lifecycle.down(NAME)
    assert leftovers(NAME) == NOTHING


def test_the_workers_of_a_killed_supervisor_are_ended_too() -> None:
    built = lifecycle.up(Spec(NAME, nodes=1, instances=1, workers=(1,)))
    supervisor = built.supervisor(built.plan.nodes[0])
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGKILL)
    until(lambda: built.supervisor(built.plan.nodes[0]) is None, "the supervisor is gone")
    lifecycle.down(NAME)
    assert leftovers(NAME) == NOTHING


def test_a_stranger_in_a_container_is_named_and_left_alone() -> None:
    built = lifecycle.up(Spec(NAME, nodes=1, instances=1, workers=(1,)))
    with subprocess.Popen(built.command("client1", ["sleep", "1000"])) as stranger:
        try:
            until(lambda: "sleep" in Path(f"/proc/{stranger.pid}/comm").read_text(), "it sleeps")
            done = lab_command("down")
            assert done.returncode == 1
            assert f"left alone, as the lab did not start them: processes {stranger.pid} (sleep 1000)" in done.stderr
            assert stranger.poll() is None
        finally:
            stranger.kill()
    assert leftovers(NAME) == NOTHING


def test_down_may_be_typed_in_a_containers_shell() -> None:
    lifecycle.up(Spec(NAME, nodes=1, instances=1, workers=(1,)))
    done = lab_command("exec", "client1", "--", *command("down"))
    assert done.returncode == 0, done.stderr
    assert leftovers(NAME) == NOTHING


def test_a_command_in_a_container_ends_with_the_lab() -> None:
    lifecycle.up(Spec(NAME, nodes=1, instances=1, workers=(1,)))
    with lab_running("exec", "client1", "--", "sleep", "1000") as forgotten:
        until(lambda: "sleep" in Path(f"/proc/{forgotten.pid}/comm").read_text(), "it sleeps")
        lifecycle.down(NAME)
        assert forgotten.wait(5) == -signal.SIGTERM


def test_a_supervisor_that_cannot_start_fails_up_with_its_log() -> None:
    done = lab_command("up", *SMALL, "--set", "tables.static=/nowhere/tables.json")
    assert done.returncode == 1
    assert "/nowhere/tables.json" in done.stderr
    assert leftovers(NAME) == NOTHING


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["up", "--nodes", "0"], "nodes: expected 1 to 1000, got 0"),
        (["up", "--workers", "two"], "workers: expected numbers with commas between them, got 'two'"),
        (["up", "--set", "offload.udp_gsoo=false"], "set: offload.udp_gsoo"),
        (["status"], f"no lab {NAME!r}: start it with `appliance lab up`"),
        (["exec", "client1", "--", "true"], f"no lab {NAME!r}: start it with `appliance lab up`"),
    ],
    ids=["nodes", "workers", "set", "status", "exec"],  # a name with our process number would differ between processes
)
def test_what_cannot_be_done_is_one_sentence_and_touches_nothing(arguments: list[str], complaint: str) -> None:
    done = lab_command(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"appliance lab: {complaint}")
    assert done.stderr.count("\n") == 1
    assert leftovers(NAME) == NOTHING


def test_down_without_a_lab_is_no_error() -> None:
    done = lab_command("down")
    assert (done.returncode, done.stderr) == (0, f"no lab {NAME!r}\n")


def test_two_ups_of_one_lab_do_not_mix() -> None:
    """The second one waits, then starts afresh."""
    with lab_running("up", *SMALL) as first:
        wait_for(first, "network:")
        second = lab_command("up", *SMALL)
        assert first.wait(30) == 0
    assert second.returncode == 0, second.stderr
    assert second.stderr.startswith(f"removing lab {NAME!r}")
    assert lab_command("exec", "client1", "--", "curl", "-sf", "10.30.30.30").returncode == 0
