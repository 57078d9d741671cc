"""What a supervisor that dies, or restarts on purpose, leaves to the next one: everything."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from appliance.client import ApiError
from appliance.dataplane import memory
from appliance.supervisor import record
from tests.supervisor.world import Node, World, alive, until

pytestmark = pytest.mark.root


def alone(hub: World, **settings: dict[str, Any]) -> Node:
    """A node without a cluster."""
    network = {"subnet_v4": "10.18.0.0/26", "subnet_v6": "fc00::/120"}
    return hub.node(network=network, workers={"count": 2, "flows": 1024} | settings.pop("workers", {}), **settings)


def workers(node: Node) -> list[int]:
    return [it["pid"] for it in node.api.status()["workers"]]


WAYS = ("SIGUSR2", "restart", "SIGKILL")
"""The last one is in ``tests/lab/test_restarts.py`` too."""


def test_workers_and_devices_go_on(hub: World, long: bool) -> None:
    node = alone(hub).start()
    for how in WAYS if long else WAYS[:2]:
        goes_on(node, how)
    before = workers(node)
    node.api.renew_workers()
    assert not set(workers(node)) & set(before)
    until(lambda: not any(map(alive, before)), "the old workers have ended, and were waited for", 30)
    assert node.stop() == 0
    until(lambda: not node.processes(), "a stop on purpose ends everything")


def goes_on(node: Node, how: str) -> None:
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers", 30)
    status = node.api.status()
    before, links, epoch, resolver = workers(node), node.namespace.state(), status["tables"]["epoch"], status["naming"]
    control = control_of(node)
    os.pwrite(control, (1).to_bytes(8, "little"), 8 * memory.CAPTURE)  # as if it had gone in the middle of a capture
    again(node, how)
    assert workers(node) == before, how
    assert not any(os.pread(control, 8, 8 * memory.CAPTURE)), how
    os.close(control)
    assert node.namespace.state() == links, how
    assert node.api.status()["tables"]["epoch"] > epoch, how
    until(lambda: not alive(resolver["pid"]), "the next resolver has taken over, and the old one was waited for", 30)


def test_a_supervisor_that_ends_before_its_resolver_took_over_leaves_none_behind(hub: World) -> None:
    """Its resolver is held at its start, so that it is not ready when its supervisor is killed."""
    node = alone(hub).start()
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers", 30)
    (first,) = node.resolvers()
    node.stop(signal.SIGKILL)
    node.launch()
    (second,) = until(lambda: set(started_resolvers(node)) - {first}, "the next resolver is started", 60)
    os.kill(second, signal.SIGSTOP)
    node.stop(signal.SIGKILL)
    os.kill(second, signal.SIGCONT)
    node.start()
    until(lambda: node.api.status()["naming"]["ready"], "the third resolver answers", 30)
    until(lambda: node.resolvers() == [node.api.status()["naming"]["pid"]], "it is alone", 30)
    assert node.stop() == 0
    until(lambda: not node.processes(), "a stop on purpose ends everything")


def started_resolvers(node: Node) -> list[int]:
    """Resolvers, those too that have not given themselves their name yet."""
    found = []
    for pid in node.processes():
        with suppress(OSError):
            if b"appliance.naming.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def since(node: Node) -> float:
    """When the supervisor was started last; 0 if it does not answer."""
    try:
        return float(node.api.status()["node"]["started"])
    except ApiError:
        return 0.0


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
        until(lambda: since(node) not in (0.0, started), "it is back", 60)


def control_of(node: Node) -> int:
    """A worker's control words."""
    mine = Path(f"/proc/{record.alive(node.directory / 'run')['supervisor']}/fd")
    found = next(it for it in mine.iterdir() if "edge-control-0" in str(it.readlink()))
    return os.open(found, os.O_RDWR)


def kill_template(node: Node) -> None:
    pid = until(lambda: record.alive(node.directory / "run").get("template"), "there is one")
    os.kill(pid, signal.SIGKILL)
    until(lambda: record.started(pid) == 0, "it has ended")


def forwarding(node: Node) -> set[int]:
    """What runs of a node beside its resolvers, which come and go by themselves."""
    return set(node.processes()) - set(node.resolvers())


def test_a_worker_that_dies_with_its_template_is_replaced(hub: World) -> None:
    node = alone(hub).start()
    first, second = workers(node)
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers", 30)
    os.kill(first, signal.SIGKILL)
    kill_template(node)
    until(lambda: workers(node)[0] not in (0, first), "the next template was asked for it", 60)
    assert workers(node)[1] == second
    before = workers(node)
    kill_template(node)
    again(node, "restart")
    assert workers(node) == before, "it waited for a template that keeps them"
    until(lambda: node.api.status()["naming"]["ready"], "the resolver has taken over", 30)
    kill_template(node)
    node.stop(signal.SIGKILL)
    node.start()
    assert not any(map(record.started, before)), "its template had been told nothing yet"
    until(lambda: node.api.status()["naming"]["ready"], "the resolver has taken over", 30)
    assert node.stop() == 0
    until(lambda: not forwarding(node), "a stop on purpose ends template and workers")


def test_a_supervisor_that_dies_before_it_has_renewed_leaves_everything(hub: World, long: bool) -> None:
    if not long:
        pytest.skip("four starts of a supervisor: only with --long")
    node = alone(hub).start()
    before = workers(node)
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers", 30)
    node.stop(signal.SIGKILL)
    node.settings["workers"]["busy_poll"] = 5
    node.launch()
    until(lambda: (node.directory / "run" / "holder.new").exists(), "its template begins", 60)
    node.stop(signal.SIGKILL)
    assert all(map(record.started, before))
    node.start()
    until(lambda: not any(map(record.started, before)), "all were replaced", 30)
    until(lambda: 0 not in workers(node), "they run", 30)
    until(lambda: node.api.status()["naming"]["ready"], "the resolver has taken over", 30)
    assert "beginning anew" not in node.log.read_text()
    assert node.log.read_text().count("step=renew") == 2
    again(node, "SIGUSR2")
    assert node.log.read_text().count("step=adopt") == 1, "the next one finds the last template"
    until(lambda: node.api.status()["naming"]["ready"], "the resolver has taken over", 30)
    assert node.stop() == 0
    until(lambda: not forwarding(node), "a stop on purpose ends template and workers")
