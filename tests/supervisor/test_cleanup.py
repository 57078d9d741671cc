"""`appliance cleanup` after every kind of end leaves the node as it was before the appliance came."""

import json
import os
import signal
import subprocess
import sys
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from appliance.dataplane import bpf, steering
from appliance.environment import guard
from appliance.supervisor import record
from tests.environment.footprint import cgroups, everywhere, footprint, loaded, tag
from tests.environment.netns import Netns
from tests.manager.processes import ROOT
from tests.supervisor.test_handover import started_resolvers
from tests.supervisor.world import Node, World, alive, until

pytestmark = pytest.mark.root

JOB = "app.ns.web.test"
ENDS = (
    "stopped", "everything", "supervisor", "supervisor and worker.0", "supervisor and resolver",
    "template and supervisor", "worker.0 and resolver and template and supervisor",
)  # fmt: skip
"""Who is killed, in this order; at last the supervisor, as otherwise it mends the rest."""
SUBNET, WORKERS = "10.18.61.64/26", 5
"""No other test has these, so that programs made of them are this one's."""


def cleanup(node: Node, *options: str) -> tuple[int, list[str], str]:
    """Exit status, what was removed, and standard error."""
    command = ["ip", "netns", "exec", node.namespace.name, sys.executable, "-m", "appliance", "cleanup", "--json"]
    command += ["-c", str(node.directory / "appliance.toml"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.returncode, json.loads(done.stdout)["removed"] if done.stdout else [], done.stderr


def seen(node: Node, container: Netns) -> dict[str, object]:
    """What is there: in the kernel, of processes, and of files beside the test's own."""
    files = {it for it in node.directory.rglob("*") if it.name not in ("appliance.toml", "log")}
    resolvers = Path("/etc/netns", container.name).exists()
    namespaces = {"node": footprint(node.namespace), "container": footprint(container)}
    return {**namespaces, **everywhere(), "processes": node.named(), "files": files, "resolvers": resolvers}


def programs(attached: dict[str, Any]) -> set[str]:
    """The tags of the programs that the node has in the kernel: to steer, and to guard the container."""
    steering_ = [steering.program(WORKERS, inbound=inbound) for inbound in (False, True)]
    addresses = [IPv4Address(attached["address_v4"])]
    return {tag(bpf.SOCKET_FILTER, it) for it in steering_} | {tag(bpf.CLASSIFIER, guard.program(tuple(addresses)))}


def all_parts(node: Node) -> dict[str, int] | None:
    """The node's processes, once it has all of them."""
    living = record.alive(node.directory / "run")
    return living if {"supervisor", "template", "worker.0", "resolver"} <= living.keys() else None


def is_unloaded(tags: set[str], end: str) -> None:
    until(lambda: not tags & loaded(), f"{end}: the programs are gone")


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(record.started, pids)), "they have ended")


def ends(node: Node, end: str) -> None:
    """Ends a node's processes in one of `ENDS`."""
    living = until(lambda: all_parts(node), "all parts are recorded")
    assert cgroups(living.values()) == cgroups([os.getpid()]), "they make no control groups, and move to none"
    if end == "stopped":
        node.stop()
    else:
        kill(*(living.values() if end == "everything" else (living[name] for name in end.split(" and "))))
    assert node.popen is not None
    node.popen.wait()


def test_it_removes_everything_after_every_kind_of_end(hub: World, long: bool) -> None:
    container = hub.container()
    node = hub.node(network={"subnet_v4": SUBNET}, workers={"count": WORKERS})
    before = seen(node, container)
    for end in ENDS if long else ENDS[-1:]:
        node.start()
        attached = node.api.attach(JOB, 0, {"netns": container.name}, "8080:80")
        ours = programs(attached)
        assert ours <= loaded()
        status, _, error = cleanup(node)
        assert (status, "expected no supervisor that runs" in error) == (1, True)
        ends(node, end)
        status, removed, error = cleanup(node)
        assert status == 0, error
        assert any("edge-br0" in it for it in removed)
        assert "table inet edge-appliance" in removed
        (node.state).rmdir()  # it is empty, and only --purge removes it
        until(lambda: seen(node, container) == before, f"{end}: {seen(node, container)}, was {before}")
        is_unloaded(ours, end)


def test_a_resolver_that_was_about_to_take_over_goes_too(hub: World, long: bool) -> None:
    """It hangs at its start, so that there are two when the second supervisor is killed."""
    if not long:
        pytest.skip("two starts of a supervisor: only with --long")
    node = hub.node(network={"subnet_v4": SUBNET})
    before = seen(node, hub.container())
    container = hub.container()
    node.start()
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers", 30)
    node.stop(signal.SIGKILL)
    first = set(node.resolvers())
    node.launch()
    (second,) = until(lambda: set(started_resolvers(node)) - first, "the next resolver is started", 60)
    os.kill(second, signal.SIGSTOP)
    until((node.directory / "run" / "resolver.new").exists, "it can be told to leave")
    until(lambda: record.alive(node.directory / "run").get(record.RESOLVER) == second, "it is recorded")
    node.stop(signal.SIGKILL)
    status, removed, error = cleanup(node)
    assert status == 0, error
    assert f"file {node.directory / 'run' / 'resolver.new'}" not in removed, "whoever told it to leave removed that"
    (node.state).rmdir()
    until(lambda: seen(node, container) == before, f"{seen(node, container)}, was {before}")


def test_workers_without_template_and_supervisor_give_way(hub: World) -> None:
    node = hub.node(network={"subnet_v4": "10.18.0.0/26"}).start()
    living = record.alive(node.directory / "run")
    kill(living["supervisor"], living["template"])
    assert alive(living["worker.0"])
    node.start()
    until(lambda: record.started(living["worker.0"]) == 0, "the old worker has ended")
    assert node.api.status()["workers"][0]["pid"] not in (0, living["worker.0"])


def test_a_guests_namespace_and_what_the_cni_plugin_noted_go_too(hub: World) -> None:
    guest, network = f"{JOB}.instance.7", "edge"
    container = hub.container()
    node = hub.node(network={"subnet_v4": "10.18.0.0/26"})
    subprocess.run(["ip", "netns", "add", guest], check=True)
    try:
        node.start()
        node.api.attach(JOB, 7, {"netns": guest})
        node.api.attach(JOB, 8, {"netns": container.name})
        noted = node.directory / "run" / "cni" / network / "0123:eth0"
        noted.parent.mkdir(parents=True)
        noted.write_text("{}")
        node.stop(signal.SIGKILL)
        status, removed, error = cleanup(node)
        assert status == 0, error
        assert {f"namespace {guest}", f"file {noted}"} <= set(removed)
        assert not Path("/run/netns", guest).exists()
        assert Path("/run/netns", container.name).exists(), "that is somebody else's"
        assert not (node.directory / "run").exists()
    finally:
        subprocess.run(["ip", "netns", "del", guest], check=False, capture_output=True)


def test_what_others_made_stays(hub: World) -> None:
    node = hub.node(network={"subnet_v4": "10.18.0.0/26"}).start()
    theirs = node.directory / "run" / "theirs"
    theirs.write_text("")
    node.namespace.ip("link", "add", "ea0123456789", "type", "veth", "peer", "name", "other")
    node.namespace.ip("link", "add", "br9", "type", "bridge")
    node.stop()
    assert cleanup(node)[0] == 0
    assert theirs.exists()
    links = subprocess.run(
        ["ip", "-n", node.namespace.name, "-o", "link"], capture_output=True, text=True, check=True
    ).stdout
    assert "ea0123456789" in links
    assert "br9" in links
    assert "edge-br0" not in links


def test_orphans() -> None:
    workers = {"worker.0": 7, "worker.1": 8}
    assert record.orphans(workers, ()) == workers
    assert record.orphans(workers, ("manifest", "tables", "0.tun", "1.tun")) == workers, "nobody has the processes"
    assert record.orphans(workers, ("0.process", "manifest")) == {"worker.1": 8}
    assert record.orphans({**workers, "template": 6}, ()) == {}
    assert record.orphans({**workers, "supervisor": 5}, ()) == {}
