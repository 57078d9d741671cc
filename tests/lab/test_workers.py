"""Flows are spread over the workers, and no flow is in two of them."""

import time
from collections import Counter

import pytest

from appliance import limits
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import Family
from tests.lab.helpers import FAMILIES, balanced, counters, probe

pytestmark = pytest.mark.root

FLOWS = 64


@pytest.mark.parametrize("family", FAMILIES)
def test_64_flows_are_carried_by_both_workers_and_none_by_two(lab: Lab, family: Family) -> None:
    before = {node.name: counters(lab, node) for node in lab.plan.nodes}
    calls = probe(lab, "client1", balanced(family), FLOWS)
    for node in lab.plan.nodes:
        for old, new in zip(before[node.name], counters(lab, node), strict=True):
            assert new["tun_packets"] - old["tun_packets"] > FLOWS // 4, node.name
            assert new["wire_packets"] - old["wire_packets"] > FLOWS // 4, node.name
    flows = lab.api(lab.plan.nodes[0]).flows()
    owners = Counter((it["protocol"], it["local_port"]) for it in flows)
    ours = {(it["protocol"], it["port"]) for it in calls}
    assert {flow: owners[flow] for flow in ours} == dict.fromkeys(ours, 1)


def test_an_idle_worker_wakes_by_itself_again_and_again(lab: Lab) -> None:
    """It looks for flows that expired, and for packets that waited too long."""
    node = lab.plan.nodes[0]
    before = counters(lab, node)
    time.sleep(1)
    for old, new in zip(before, counters(lab, node), strict=True):
        assert new["waits"] - old["waits"] >= limits.SECOND // limits.WAIT_NS - 3
