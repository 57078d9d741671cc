"""`appliance profile worker` on one that carries packets: py-spy sees its stages by name, and nobody else notices."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from appliance.lab.lifecycle import Lab
from tests.lab.helpers import background, balanced, counters, instance_ip, line, program, run, until

pytestmark = pytest.mark.root

SECONDS = 1


def test_a_loaded_workers_stages_have_names(lab: Lab, tmp_path: Path) -> None:
    node, file = lab.plan.nodes[0], tmp_path / "worker.svg"
    before = [it["pid"] for it in lab.api(node).status()["workers"]]
    target = instance_ip(lab, lab.plan.web[1], "v4")
    with (
        background(lab, "client1", *program("caller", balanced("v4"))) as caller,
        background(lab, "client1", "iperf3", "-c", target, "-p", "5201", "-t", "30", "--bidir"),
    ):
        assert line(caller) == "ready"
        was = counters(lab, node)
        until(lambda: sum(_packets(lab)) > sum(it["tun_packets"] for it in was) + 1_000, "packets pass")
        config = str(lab.files.config(node.name))
        command = (sys.executable, "-m", "appliance", "profile", "worker", str(file))
        said = run(lab, node.name, *command, "--seconds", str(SECONDS), "-c", config)
        index = int(said.split()[-1])
        staged = _packets(lab)[index]
        until(lambda: _packets(lab)[index] > staged, "packets pass while the stages are called one by one")
    names = set(re.findall(r"(\w+) \([^)]*dataplane/staged\.py", file.read_text()))
    assert {"forward", "drive", "outbound", "inbound"} <= names
    assert [it["pid"] for it in lab.api(node).status()["workers"]] == before


def _packets(lab: Lab) -> list[int]:
    """From the containers of node 1, by worker."""
    return [it["tun_packets"] for it in counters(lab, lab.plan.nodes[0])]
