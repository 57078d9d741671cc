"""A real dockerd on each of two nodes: containers of its own making call each other by name."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runtimes.docker import Docker, lacking
from tests.runtimes.podman import rootfs
from tests.supervisor.pair import Pair
from tests.supervisor.world import until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
    pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="needs musl-gcc (musl-tools)"),
]
WEB, CALLER = "app.ns.dockweb.test", "app.ns.dockcall.test"
CREATE = ("network", "create", "--driver", "edge-appliance", "--ipam-driver", "edge-appliance")
SERVICE, INSTANCE = "edge-appliance/service", "edge-appliance/instance"


@pytest.fixture
def dockers(pair: Pair, tmp_path: Path) -> Iterator[list[Docker]]:
    """One on each node. Their directory's name is short, as its sockets want it."""
    short = Path(tempfile.mkdtemp(prefix="dk-", dir="/tmp"))
    made = [Docker(node, short / node.name) for node in (pair.one, pair.two)]
    try:
        yield [it.start() for it in made]
    finally:
        for it in made:
            it.stop()
        shutil.rmtree(short, ignore_errors=True)


def place(service: str) -> str:
    """The value of `--network` of a service's first instance."""
    return f"name=edge,driver-opt={SERVICE}={service},driver-opt={INSTANCE}=0"


def test_containers_of_docker_on_two_nodes_call_each_other_by_name(pair, dockers, busybox, tmp_path):
    one, two = dockers
    pair.manager.deploy(WEB, 1, service_ips={"rr": {"v4": "10.30.61.1", "v6": "fdff:2000::6101"}})
    pair.manager.deploy(CALLER, 1)
    root = rootfs(tmp_path / "root", busybox)
    source = ROOT / "tests" / "lab" / "programs" / "fetch.c"
    subprocess.run(["musl-gcc", "-static", "-o", root / "bin" / "fetch", source], check=True, timeout=60)
    for docker in dockers:
        docker.image("box", root)
        docker.run(*CREATE, "edge")
    assert SERVICE in one.refused("run", "--rm", "--network", "edge", "box", "/bin/sh", "-c", "true")
    one.run("run", "-d", "--name", "web", "--network", place(WEB), "-p", "8088:80",
            "box", "/bin/busybox", "httpd", "-f", "-h", "/www")  # fmt: skip
    until(lambda: pair.is_up(WEB), "the cluster has the instance")
    gateway = two.node.api.attachments()[0]["gateway_v4"]
    said = two.run(
        "run", "--rm", "--name", "caller", "--network", place(CALLER), "--dns", gateway,
        "--dns-search", "test.app.ns.local", "--dns-option", "ndots:2",
        "box", "/bin/sh", "-c", "cat /etc/resolv.conf; fetch dockweb",
    )  # fmt: skip
    assert "nameserver 127.0.0.11" in said, "Docker's own, which asks ours"
    assert said.count("it is the web") == 2, "over both families"
    assert not [it for it in pair.two.api.attachments() if it["service"] == CALLER], "the endpoint was deleted"
    outside = pair.world.hub.command("curl", "-s", "--max-time", "5", f"http://{pair.one.address}:8088/")
    assert outside == "it is the web\n"
    one.run("kill", "web")
    until(lambda: not [it for it in pair.one.api.attachments() if it["service"] == WEB], "Docker says that it is gone")
    one.run("start", "web")
    until(lambda: pair.is_up(WEB), "it is there again")
    one.run("rm", "--force", "web")
    for docker in dockers:
        docker.run("network", "rm", "edge")
