"""What a supervisor that dies, or restarts on purpose, leaves to the next one: everything."""

import signal
from typing import Any

import pytest

from tests.supervisor.world import Node, World, alive, until

pytestmark = pytest.mark.root


def alone(hub: World, **settings: dict[str, Any]) -> Node:
    """A node without a cluster."""
    network = {"subnet_v4": "10.18.0.0/26", "subnet_v6": "fc00::/120"}
    return hub.node(network=network, workers={"count": 2, "flows": 1024} | settings.pop("workers", {}), **settings)


def workers(node: Node) -> list[int]:
    return [it["pid"] for it in node.api.status()["workers"]]


@pytest.mark.parametrize("how", ["SIGKILL", "SIGUSR2", "restart"])
def test_workers_and_devices_go_on(hub: World, how: str) -> None:
    node = alone(hub).start()
    before, links, epoch = workers(node), node.namespace.state(), node.api.status()["tables"]["epoch"]
    again(node, how)
    assert workers(node) == before
    assert node.namespace.state() == links
    assert node.api.status()["tables"]["epoch"] > epoch
    assert node.stop() == 0
    until(lambda: not node.processes(), "a stop on purpose ends everything")


def again(node: Node, how: str) -> None:
    """Ends the supervisor in some way, and has another one."""
    started = node.api.status()["node"]["started"]
    if how != "restart":
        status = node.stop(signal.Signals[how])
        assert status == (0 if how == "SIGUSR2" else -signal.SIGKILL)
        node.start()
    else:
        assert node.popen is not None
        assert node.api.restart() == node.popen.pid
        until(lambda: node._answers() and node.api.status()["node"]["started"] != started, "it is back", 30)


def test_rolling_replacement(hub: World) -> None:
    node = alone(hub).start()
    before = workers(node)
    node.api.renew_workers()
    after = workers(node)
    assert not set(after) & set(before)
    assert not any(map(alive, before))
