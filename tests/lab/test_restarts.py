"""Connections through everything that an operator, or a mishap, does to a node that runs.

client1 on node 1 → 200 idle TCP connections, a UDP ping of 1 kHz, iperf3 → web1 on node 2. Whatever is done is done on
both nodes at once.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from appliance.client import ApiError
from appliance.lab import lifecycle, processes
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import IPERF_PORTS, Node, Setting
from tests.conftest import ROOT
from tests.lab.conftest import VARIED
from tests.lab.helpers import background, environment, instance_ip, line, program, until
from tests.supervisor.versions import SUPERVISOR, installed

pytestmark = pytest.mark.root

PORT = 7011
CONNECTIONS = 200
KEEPALIVE_S = 15
"""A supervisor has 1.5 times as long to come back before the broker says that its node is lost; on a busy machine
loading Python alone takes seconds."""


@dataclass
class Steady:
    """The client; `since` tells what became of its packets since the last time."""

    lab: Lab
    child: subprocess.Popen[str]
    load: subprocess.Popen[str]

    def since(self) -> dict[str, Any]:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        said: dict[str, Any] = json.loads(line(self.child))
        assert self.load.poll() is None, "iperf3 has ended"
        return said


@contextmanager
def steady(lab: Lab) -> Iterator[Steady]:
    address = instance_ip(lab, lab.plan.web[1], "v4")
    iperf = ["iperf3", "--client", address, "--port", str(IPERF_PORTS[0]), "--time", "600", "--bitrate", "20M"]
    command = lab.command("client1", program("steady", address, PORT, CONNECTIONS))
    with background(lab, "web1", *program("echo", PORT)) as server:
        assert line(server) == "ready"
        pipe = subprocess.PIPE
        with (
            background(lab, "client1", *iperf) as load,
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment(lab), cwd=ROOT) as child,
        ):
            try:
                assert line(child) == "ready"
                time.sleep(0.3)
                yield Steady(lab, child, load)
            finally:
                child.kill()


def started(lab: Lab, node: Node) -> float:
    """When a node's supervisor was started last; 0 if it does not answer."""
    try:
        return float(lab.api(node).status()["node"]["started"])
    except ApiError:
        return 0.0


def workers(lab: Lab) -> list[int]:
    """The workers of all nodes."""
    return [it["pid"] for node in lab.plan.nodes for it in lab.api(node).status()["workers"]]


def reload(lab: Lab) -> None:
    for node in lab.plan.nodes:
        lab.api(node).reload()


def restart(lab: Lab) -> None:
    before = {node: started(lab, node) for node in lab.plan.nodes}
    for node in lab.plan.nodes:
        lab.api(node).restart()
    until(lambda: all(started(lab, it) not in (0.0, before[it]) for it in lab.plan.nodes), "they are back", 40)


def renew(lab: Lab) -> None:
    for node in lab.plan.nodes:
        lab.api(node).renew_workers()


def kill(lab: Lab) -> None:
    processes.kill(it for node in lab.plan.nodes if (it := lab.supervisor(node)) is not None)
    for node in lab.plan.nodes:
        lifecycle.start(VARIED, node.name)


def upgrade(lab: Lab, directory: Path) -> None:
    """To other code in another place, as `systemctl restart` does it."""
    supervisors = [it for node in lab.plan.nodes if (it := lab.supervisor(node)) is not None]
    for it in supervisors:
        os.kill(it.pid, signal.SIGUSR2)
    until(lambda: not any(map(processes.alive, supervisors)), "they have left everything to the next", 40)
    change = SUPERVISOR, 'log.info("ready",', 'log.info("ready, of another version",'
    with pytest.MonkeyPatch.context() as patch:
        for name, value in installed(directory, VERSION, *change).items():
            patch.setenv(name, value)
        for node in lab.plan.nodes:
            lifecycle.start(VARIED, node.name)
        assert {lab.api(node).status()["node"]["version"] for node in lab.plan.nodes} == {VERSION}
        until(lambda: all(lab.api(it).status()["naming"]["ready"] for it in lab.plan.nodes), "so have resolvers", 40)


VERSION = "9.1.0"
WORKERS = "rolling replacement of the workers"
ACTS = {"reload": reload, "restart on purpose": restart, "SIGKILL of the supervisor": kill, WORKERS: renew}


def test_nothing_breaks(
    build: Callable[..., Lab], tmp_path: Path, capsys: pytest.CaptureFixture[str], long: bool
) -> None:
    """With ``--long`` an upgrade too."""
    acts: dict[str, Callable[[Lab], None]] = {**ACTS}
    if long:
        acts["upgrade to other code"] = partial(upgrade, directory=tmp_path)
    lab = build(workers=(2,), settings=(Setting("cluster", "keepalive", KEEPALIVE_S),))
    said = {}
    with steady(lab) as client:
        for name, act in acts.items():
            client.since()
            before = workers(lab)
            act(lab)
            said[name] = client.since()
            assert (workers(lab) == before) == (name != WORKERS), name
        with capsys.disabled():
            print(*(f"\n{name}: {it}" for name, it in said.items()))
    for name, it in said.items():
        assert it["broken"] == 0, (name, it)
        assert it["gap_ms"] < 1000, (name, it)
        assert it["lost"] == 0 or name == WORKERS, (name, it)
