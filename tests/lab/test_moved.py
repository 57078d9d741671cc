"""How soon a UDP client that never stops is moved when its instance is removed: from the request to the first answer of
another instance, removal after removal."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest

from appliance.lab.lifecycle import Lab
from tests.conftest import ROOT
from tests.lab.helpers import TIMEOUT_S, balanced, environment, line, probe, program, until

pytestmark = pytest.mark.root

REMOVALS = 20
MOVED_S = 0.1


@dataclass(frozen=True)
class Removal:
    """Seconds: from the request to the first answer of another instance; without any answer; the request itself."""

    moved: float
    silent: float
    request: float


def removal(lab: Lab) -> Removal:
    """One client sends a datagram each millisecond from one socket; who answers it is detached, and attached again."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = lab.command("client1", program("unstopped", balanced("v4")))
    with subprocess.Popen(command, env=environment(lab), cwd=ROOT, **pipes) as client:
        try:
            assert line(client) == "ready"
            assert client.stdin is not None
            time.sleep(0.2)
            client.stdin.write("\n")
            client.stdin.flush()
            before = line(client)
            gone = next(it for it in lab.plan.web if it.name == before)
            began = time.monotonic()
            lab.api(gone.node).detach(gone.service, gone.instance)
            done = time.monotonic()
            time.sleep(0.5)
            output, _ = client.communicate(timeout=TIMEOUT_S)
        finally:
            client.kill()
            lab.api(gone.node).attach(gone.service, gone.instance, {"netns": gone.namespace})
    (old, _, last), (new, first, _), *more = json.loads(output)
    assert (old, more) == (before, [])
    assert new != old
    return Removal(first - began, first - last, done - began)


def test_twenty_removals_move_their_clients_in_time(three: Lab, long: bool, capsys: Any) -> None:
    if not long:
        pytest.skip("twenty removals: only with --long")
    every = {it.name for it in three.plan.web}
    removals: list[Removal] = []
    for _ in range(REMOVALS):
        until(lambda: {it["container"] for it in probe(three, "client1", balanced("v4"), 8)} == every, "all are called")
        removals.append(removal(three))
    told = {name: [getattr(it, name) for it in removals] for name in ("moved", "silent", "request")}
    with capsys.disabled():
        for name, times in told.items():
            print(f"\n{name}: median {1000 * median(times):.0f} ms, most {1000 * max(times):.0f} ms", end="")
        print("", json.dumps([[round(1000 * it) for it in (each.moved, each.silent)] for each in removals]))
    assert median(told["moved"]) < MOVED_S
