"""`closest` on real nodes whose cables become longer and shorter: a forwarder in them delays every frame.

In the underlay's namespace: bridge ── slow2 ══ slow2x ── delayer ── node2 ══ uplink of node 2; node 3 likewise.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pyroute2 import IPRoute

from appliance.lab.lifecycle import Lab
from appliance.lab.network import BRIDGE, entered
from appliance.lab.plan import CLOSEST_V4, Node
from tests.conftest import ROOT
from tests.lab.helpers import environment, line, probe, program, until

pytestmark = pytest.mark.root

FOLLOWED_S = 10.0
"""Within which a change of delay has moved new flows."""
STEADY_S = 30.0
JITTER = 25
"""Per cent of the delay, up and down, evenly."""
STEP_S = 0.05


class Cable:
    """The cable of a node, with a forwarder in it."""

    def __init__(self, forwarder: subprocess.Popen[str]) -> None:
        self._forwarder = forwarder

    def delay(self, milliseconds: float, jitter: int = 0) -> None:
        """Of each direction, from now on."""
        assert self._forwarder.stdin is not None
        self._forwarder.stdin.write(f"{milliseconds} {jitter}\n")
        self._forwarder.stdin.flush()


@contextmanager
def cable(lab: Lab, node: Node) -> Iterator[Cable]:
    """A forwarder between a node and the underlay's bridge; the node's own port is in the bridge again afterwards."""
    inner, outer = f"slow{node.number}", f"slow{node.number}x"
    with entered(lab.plan.underlay), IPRoute() as ip:
        (bridge,), (port,) = (ip.link_lookup(ifname=it) for it in (BRIDGE, node.name))
        ip.link("add", ifname=inner, kind="veth", peer={"ifname": outer})
        (near,), (far,) = (ip.link_lookup(ifname=it) for it in (inner, outer))
        ip.link("set", index=far, state="up")
        ip.link("set", index=port, master=0)
        ip.link("set", index=near, master=bridge, state="up")
    command = lab.command("underlay", program("delayer", node.name, outer))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    try:
        with subprocess.Popen(command, env=environment(lab), cwd=ROOT, **pipes) as forwarder:
            try:
                assert line(forwarder) == "ready"
                yield Cable(forwarder)
            finally:
                forwarder.kill()
    finally:
        with entered(lab.plan.underlay), IPRoute() as ip:
            ip.link("del", index=near)
            ip.link("set", index=port, master=bridge)


def nearest(lab: Lab) -> str:
    """The container that node 1's tables have first for the demo's `closest` ServiceIP."""
    (service,) = (it for it in lab.api(lab.plan.nodes[0]).services() if it["address"] == str(CLOSEST_V4))
    picture = lab.manager.picture()
    return next(it.name for it in lab.plan.web if picture.placed(it).address_v4 == service["backends"][0])


def changes(lab: Lab, seconds: float) -> list[str]:
    """Who was nearest, one after the other, during some time."""
    seen, end = [nearest(lab)], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(STEP_S)
        if (now := nearest(lab)) != seen[-1]:
            seen.append(now)
    return seen


def answering(lab: Lab) -> set[str]:
    """Who answers calls of the demo's `closest` ServiceIP from node 1."""
    return {it["container"] for it in probe(lab, "client1", str(CLOSEST_V4), 4)}


def test_a_change_of_delay_is_followed_in_time_and_noise_is_not(three: Lab, long: bool, capsys: Any) -> None:
    if not long:
        pytest.skip("a minute and a half of round trips: only with --long")
    web0 = three.plan.web[0]
    three.api(web0.node).detach(web0.service, web0.instance)  # or node 1 would be its own nearest
    took: list[float] = []
    try:
        with cable(three, three.plan.nodes[1]) as one, cable(three, three.plan.nodes[2]) as other:
            near, far, expected = (one, other), (other, one), ("web1", "web2")
            for cables, wanted in ((near, expected[0]), (far, expected[1]), (near, expected[0])):
                cables[0].delay(5, JITTER)
                cables[1].delay(20, JITTER)
                began = time.monotonic()
                until(lambda: nearest(three) == wanted, f"{wanted} is nearest", FOLLOWED_S, STEP_S)  # noqa: B023
                took.append(time.monotonic() - began)
                assert answering(three) == {wanted}
                assert changes(three, STEADY_S / 3) == [wanted]
            one.delay(10, JITTER)
            other.delay(10, JITTER)
            assert changes(three, STEADY_S) == ["web1"]
            assert answering(three) == {"web1"}
    finally:
        three.api(web0.node).attach(web0.service, web0.instance, {"netns": web0.namespace})
    until(lambda: answering(three) == {"web0"}, "the own node is nearest again")
    with capsys.disabled():
        print(f"\n`closest` followed after {json.dumps([round(it, 1) for it in took])} s")
