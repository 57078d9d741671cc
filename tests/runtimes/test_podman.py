"""A runtime that nobody here wrote: podman with CNI, and the plugins of containernetworking behind ours."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.environment.netns import Netns
from tests.runtimes.plugin import conflist, install
from tests.runtimes.podman import PLUGINS, Podman, rootfs
from tests.supervisor.pair import Pair
from tests.supervisor.world import until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("podman") is None or shutil.which("crun") is None, reason="needs podman and crun"),
    pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="needs musl-gcc (musl-tools)"),
    pytest.mark.skipif(not Path(PLUGINS, "portmap").exists(), reason="needs containernetworking-plugins"),
]
RATE = 80_000_000
WEB, CALLER = "app.ns.podweb.test", "app.ns.podcall.test"


@pytest.fixture
def podmen(pair: Pair) -> Iterator[list[Podman]]:
    """One on each node; no container is left. Their directory's name is short, as podman wants it (50 characters)."""
    made, short = [], Path(tempfile.mkdtemp(prefix="pod-", dir="/tmp"))
    for node in (pair.one, pair.two):
        own = Podman(node, short / node.name)
        install(own.directory / "bin")
        data = conflist(node, own.directory / "cni")
        data["plugins"].append({"type": "bandwidth", "ingressRate": RATE, "ingressBurst": RATE})
        (own.networks / "10-edge.conflist").write_text(json.dumps(data))
        made.append(own)
    try:
        yield made
    finally:
        for own in made:
            own.run("rm", "--all", "--force", "--time", "0", check=False)
        shutil.rmtree(short, ignore_errors=True)


def test_containers_on_two_nodes_call_each_other_by_name(pair, podmen, busybox, tmp_path):
    one, two = podmen
    pair.manager.deploy(WEB, 1, service_ips={"rr": {"v4": "10.30.60.1", "v6": "fdff:2000::6001"}})
    pair.manager.deploy(CALLER, 1)
    web, caller = (rootfs(tmp_path / name, busybox) for name in ("web", "caller"))
    source = ROOT / "tests" / "lab" / "programs" / "fetch.c"
    subprocess.run(["musl-gcc", "-static", "-o", caller / "bin" / "fetch", source], check=True, timeout=60)
    one.run(
        "run", "-d", "--network", "edge", "--name", f"{WEB}.0", "-p", "8088:80",
        "--rootfs", str(web), "/bin/busybox", "httpd", "-f", "-h", "/www",
    )  # fmt: skip
    until(lambda: pair.is_up(WEB), "the cluster has the instance")
    limits = Netns.command(pair.one.namespace, "tc", "qdisc", "show")
    assert "qdisc tbf" in limits, "bandwidth, the last of the chain"
    assert "rate 80Mbit" in limits
    said = two.run(
        "run", "--rm", "--network", "edge", "--name", f"{CALLER}.0", "--rootfs", str(caller),
        "/bin/sh", "-c", "cat /etc/resolv.conf; fetch podweb",
    )  # fmt: skip
    assert said.count("it is the web") == 2, "over both families"
    assert "search test.app.ns.local" in said
    outside = Netns.command(pair.world.hub, "curl", "-s", "--max-time", "5", f"http://{pair.one.address}:8088/")
    assert outside == "it is the web\n", "through portmap, which comes after our plugin"
    assert not [it for it in pair.two.api.attachments() if it["service"] == CALLER], "DEL was called"
    one.run("rm", "--force", "--time", "0", f"{WEB}.0")
    assert not [it for it in pair.one.api.attachments() if it["service"] == WEB]
