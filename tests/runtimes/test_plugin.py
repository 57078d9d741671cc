"""The CNI plugin and a real appliance: every operation, many at once, containers that vanish."""

import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.environment import netns
from tests.environment.netns import Netns
from tests.runtimes.plugin import Runtime
from tests.supervisor.world import World, until, world

pytestmark = pytest.mark.root

JOB = "app.ns.web.test"
MEDIAN_S = 0.1
"""What an ADD may take on a machine that has nothing else to do."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One node without a cluster, with room for many containers."""
    netns.remove_abandoned()
    with world(tmp_path_factory.mktemp("plugin")) as made:
        made.node(network={"subnet_v4": "10.18.0.0/22", "subnet_v6": "fc00::/118"}).start()
        yield made


@pytest.fixture
def runtime(alone: World, tmp_path: Path) -> Iterator[Runtime]:
    """A runtime on it; nothing is attached before and after."""
    (node,) = alone.nodes
    assert node.api.attachments() == []
    yield Runtime(node, tmp_path)
    assert node.api.attachments() == []


def path(container: Netns) -> str:
    return f"/run/netns/{container.name}"


def links(node: Netns) -> list[str]:
    """The containers' links that a node has."""
    done = subprocess.run(["ip", "-n", node.name, "-o", "link", "show", "group", "234"], capture_output=True, text=True)
    return [it for it in done.stdout.splitlines() if " veth" in it or ": ea" in it]


def test_a_container_from_add_to_del(alone: World, runtime: Runtime) -> None:
    container = alone.container()
    made = runtime.add(f"{JOB}.0", path(container))
    assert [it["name"] for it in made["interfaces"]][1:] == ["net0"]
    assert made["interfaces"][1]["mtu"] == 1450
    assert made["ips"][0]["gateway"] == "10.18.0.1"
    assert made["dns"]["search"][0] == "test.app.ns.local"
    assert made["ips"][0]["address"] in container.command("ip", "-o", "addr", "show", "net0")
    assert made["interfaces"][1]["mac"] in container.command("ip", "-o", "link", "show", "net0")
    assert "default via 10.18.0.1 dev net0" in container.command("ip", "route")
    assert runtime.call("CHECK", f"{JOB}.0", path(container), prevResult=made) == (0, None)
    other = {**made, "ips": [{"address": "10.18.3.3/22"}]}
    assert runtime.call("CHECK", f"{JOB}.0", path(container), prevResult=other)[1]["code"] == 100
    assert runtime.call("STATUS", "") == (0, None)
    for _ in range(2):
        assert runtime.call("DEL", f"{JOB}.0", path(container)) == (0, None)
    assert runtime.call("CHECK", f"{JOB}.0", path(container), prevResult=made)[1]["code"] == 3
    assert runtime.files() == []


def test_an_add_that_fails_leaves_nothing(alone: World, runtime: Runtime) -> None:
    container = alone.container()
    container.ip("link", "add", "net0", "type", "bridge")
    status, said = runtime.call("ADD", f"{JOB}.0", path(container))
    assert (status, said["code"]) == (1, 100)
    assert "net0" in said["msg"]
    assert runtime.call("ADD", f"{JOB}.1", "/run/netns/none")[1]["code"] == 100
    assert runtime.files() == []


def test_a_late_del_does_not_take_what_another_container_has_now(alone: World, runtime: Runtime) -> None:
    before, after = alone.container(), alone.container()
    runtime.add(f"{JOB}.0", path(before))
    status, said = runtime.call("ADD", "successor", path(after), args={"cni": {"labels": LABELS}})
    assert status == 0, said
    assert runtime.call("DEL", f"{JOB}.0", path(before)) == (0, None)
    assert [it["netns"] for it in runtime.node.api.attachments()] == [f"path:{path(after)}"]
    assert runtime.call("DEL", "successor", path(after)) == (0, None)


LABELS = [{"key": "edge-appliance/service", "value": JOB}, {"key": "edge-appliance/instance", "value": "0"}]


def test_gc_undoes_what_the_runtime_has_forgotten(alone: World, runtime: Runtime) -> None:
    containers = [alone.container() for _ in range(3)]
    for number, container in enumerate(containers):
        runtime.add(f"{JOB}.{number}", path(container))
    kept = [{"containerID": f"{JOB}.1", "ifname": "net0"}]
    assert runtime.collect(kept) == (0, None)
    assert [it["instance"] for it in runtime.node.api.attachments()] == [1]
    assert runtime.files() == [f"{JOB}.1:net0"]
    assert runtime.collect([]) == (0, None)


def test_a_container_that_vanishes_without_del_is_noticed(alone: World, runtime: Runtime) -> None:
    container = alone.make()
    runtime.add(f"{JOB}.0", path(container))
    subprocess.run(["ip", "netns", "del", container.name], check=True)
    until(lambda: runtime.node.api.attachments() == [], "the supervisor says so")
    assert f"lost service={JOB}" in runtime.node.log.read_text()
    assert runtime.call("DEL", f"{JOB}.0", path(container)) == (0, None)
    assert runtime.files() == []


def test_many_at_once_leak_nothing(alone: World, runtime: Runtime, long: bool) -> None:
    containers = [alone.make() for _ in range(200 if long else 24)]
    before = links(runtime.node.namespace)
    names = [f"{JOB}.{number}" for number in range(len(containers))]
    with ThreadPoolExecutor(len(containers)) as pool:
        made = list(pool.map(runtime.add, names, map(path, containers)))
        assert len({it["ips"][0]["address"] for it in made}) == len(containers)
        assert len(links(runtime.node.namespace)) == len(before) + len(containers)
        assert set(pool.map(lambda *it: runtime.call("DEL", *it)[0], names, map(path, containers))) == {0}
    assert links(runtime.node.namespace) == before
    assert runtime.files() == []
    assert all("net0" not in it.command("ip", "-o", "link") for it in containers)


def test_how_long_an_add_takes(alone: World, runtime: Runtime, long: bool) -> None:
    took = []
    for number in range(15):
        container = alone.make()
        began = time.perf_counter()
        runtime.add(f"{JOB}.{number}", path(container))
        took.append(time.perf_counter() - began)
        assert runtime.call("DEL", f"{JOB}.{number}", path(container)) == (0, None)
    median = statistics.median(took)
    print(f"median of an ADD, the program's start and end with it: {median * 1000:.0f} ms")
    if long:
        assert median < MEDIAN_S
