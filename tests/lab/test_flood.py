"""More flows than a worker's table has room for, from a container, while others have connections open."""

from __future__ import annotations

import subprocess

import pytest

from appliance.lab.lifecycle import Lab
from tests.conftest import ROOT
from tests.lab.helpers import balanced, environment, line, program, run

pytestmark = pytest.mark.root

FLOWS, FLOWS_LONG = 400_000, 1_000_000
"""Some of which the TUN's queue loses."""
TABLE = 2 * 65_536  # two workers'
CONNECTIONS = 100


def test_a_flood_of_udp_flows_ends_no_established_connection(lab: Lab, long: bool) -> None:
    node, flows = lab.plan.nodes[0], FLOWS_LONG if long else FLOWS
    before = lab.api(node).status()["workers"]
    with subprocess.Popen(
        lab.command("client1", program("keeper", balanced("v4"), CONNECTIONS)),
        env=environment(lab),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as keeper:
        try:
            assert line(keeper) == "ready"
            assert working(keeper) == CONNECTIONS
            taken = int(run(lab, "client1", *program("flood", balanced("v4"), flows), timeout=120))
            assert working(keeper) == CONNECTIONS
        finally:
            keeper.kill()
    after = lab.api(node).status()["workers"]
    assert [it["pid"] for it in after] == [it["pid"] for it in before]
    opened, evicted = (
        sum(it["counters"][name] for it in after) - sum(it["counters"][name] for it in before)
        for name in ("flows_opened", "flows_evicted")
    )
    assert taken > 0.9 * flows
    assert opened > TABLE
    assert evicted > 1_000
    assert all("flow-table-full" not in it["drops"]["tun"] for it in after)


def working(keeper: subprocess.Popen[str]) -> int:
    """How many connections still work."""
    assert keeper.stdin is not None
    keeper.stdin.write("\n")
    keeper.stdin.flush()
    return int(line(keeper))
