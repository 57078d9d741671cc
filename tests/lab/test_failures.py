"""What goes on when a worker is killed."""

import os
import signal
import time
from typing import Any

import pytest

from appliance.lab import measure
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import IPERF_PORTS, Family
from appliance.supervisor.workers import STABLE_S
from tests.lab.helpers import FAMILIES, background, instance_ip, line, program, result, run, until

pytestmark = pytest.mark.root
by_family = pytest.mark.parametrize("family", FAMILIES)

GAP_MS = 200.0
KILLS = 2
APART_S = STABLE_S + 0.2
"""Time between kills: a worker that dies younger than STABLE_S is replaced with a delay, on purpose."""


def workers(lab: Lab, node: int) -> list[dict[str, Any]]:
    return list(lab.api(lab.plan.nodes[node]).status()["workers"])


def busiest(lab: Lab, node: int) -> dict[str, Any]:
    """The worker of a node that carries most while we look."""
    before = {it["index"]: traffic(it) for it in workers(lab, node)}
    time.sleep(0.1)
    return max(workers(lab, node), key=lambda it: traffic(it) - before[it["index"]])


def traffic(worker: dict[str, Any]) -> int:
    return int(worker["counters"]["tun_bytes"] + worker["counters"]["wire_bytes"])


def kill(lab: Lab, node: int) -> None:
    """Kills the busiest worker with SIGKILL; returns when another process has its place."""
    victim = busiest(lab, node)
    os.kill(victim["pid"], signal.SIGKILL)
    until(lambda: workers(lab, node)[victim["index"]]["pid"] not in (0, victim["pid"]), "it is replaced", seconds=2)


@by_family
@pytest.mark.parametrize("node", [0, 1], ids=["sender's node", "receiver's node"])
def test_a_killed_worker_interrupts_a_connection_for_at_most_200_ms(lab: Lab, family: Family, node: int) -> None:
    target = instance_ip(lab, lab.plan.web[1], family)
    with background(lab, "web1", *program("sink", 7003)) as sink:
        assert line(sink) == "ready"
        with background(lab, "client1", *program("source", target, 7003, 1 + KILLS * APART_S)) as source:
            line(source)
            for _ in range(KILLS):
                time.sleep(APART_S)
                kill(lab, node)
            sent = result(source)
        received = result(sink)
    assert (received["bytes"], received["sha256"]) == (sent["bytes"], sent["sha256"])
    assert received["gap_ms"] <= GAP_MS, received


def test_a_killed_worker_does_not_end_iperf3(lab: Lab) -> None:
    command = measure.iperf_command(instance_ip(lab, lab.plan.web[1], "v4"), IPERF_PORTS[0], 3, streams=4)
    with background(lab, "client1", *command) as load:
        time.sleep(APART_S)
        kill(lab, 0)
        output, _ = load.communicate(timeout=20)
    assert load.returncode == 0
    assert measure.iperf_result(output).bits_per_second > 100e6


def test_a_replaced_worker_is_counted_and_the_others_are_the_same_processes(lab: Lab) -> None:
    time.sleep(APART_S)
    before = workers(lab, 1)
    os.kill(before[0]["pid"], signal.SIGKILL)
    until(lambda: workers(lab, 1)[0]["restarts"] == before[0]["restarts"] + 1, "the restart is counted", 2)
    after = workers(lab, 1)
    assert after[0]["pid"] != before[0]["pid"]
    assert after[1]["pid"] == before[1]["pid"]
    run(lab, "client1", *measure.ping_command(instance_ip(lab, lab.plan.web[1], "v6"), count=2))
