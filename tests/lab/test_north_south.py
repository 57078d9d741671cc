"""From outside the overlay into a lab: every example of a descriptor, and load while instances come and go.

The world outside is the cluster's host: it is on the underlay and in no subnet of a node.
"""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from appliance.lab import lifecycle, plan
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import Spec
from tests.conftest import ROOT
from tests.lab.conftest import OUTSIDE
from tests.lab.helpers import NOTHING, environment, leftovers, run, until

pytestmark = pytest.mark.root

PORT = 30080


@pytest.fixture(scope="module")
def three() -> Iterator[Lab]:
    """Three nodes, an instance of the demo service on each, exposed on all of them."""
    ports = [{"port": PORT, "to": plan.WEB_PORT, "protocol": it} for it in ("tcp", "udp")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.WEB, "exposed", ports)
        try:
            lab = lifecycle.up(Spec(name=OUTSIDE, nodes=3, instances=3, workers=(1,)))
            for node in lab.plan.nodes:
                until(lambda node=node: lab.api(node).status()["exposed"]["ports"], "the ports are open")  # type: ignore[misc]
            yield lab
        finally:
            lifecycle.down(OUTSIDE)
    assert leftovers(OUTSIDE) == NOTHING


def targets(lab: Lab) -> list[str]:
    """The exposed port on each node, in both families, as URLs have it."""
    both = (address for node in lab.plan.nodes for address in (node.underlay_v4, node.underlay_v6))
    return [f"[{it}]:{PORT}" if it.version == 6 else f"{it}:{PORT}" for it in map(ip_address, map(str, both))]


def test_curl_reaches_instances_on_all_nodes_through_each_node(three: Lab) -> None:
    for target in targets(three):
        urls = [f"http://{target}/"] * 6
        said = run(three, "cluster", "curl", "-sS", "--no-keepalive", "-H", "Connection: close", *urls)
        assert set(re.findall(r'"container": "(\w+)"', said)) == {"web0", "web1", "web2"}, target


ECHO = """
import json, socket, sys, time
ends, count, bad = time.monotonic() + float(sys.argv[3]), 0, 0
while time.monotonic() < ends:
    with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.connect((sys.argv[1], int(sys.argv[2])))
        sock.send(b"?")
        try:
            json.loads(sock.recv(4096))
        except OSError:
            bad += 1
        count += 1
    time.sleep(0.005)
print(count, bad)
"""


def test_load_from_outside_while_instances_scale(three: Lab, long: bool) -> None:
    """Not a call is lost: TCP by wrk, and UDP, of both families. --long: 30 s and 200 connections."""
    seconds, connections = (30, 200) if long else (4, 20)
    one, two, three_ = three.plan.nodes
    load = [
        wrk(three, f"http://{one.underlay_v4}:{PORT}/", seconds, connections // 2),
        wrk(three, f"http://[{two.underlay_v6}]:{PORT}/", seconds, connections // 2),
        echo(three, str(three_.underlay_v4), seconds),
        echo(three, str(one.underlay_v6), seconds),
    ]
    time.sleep(0.3)
    scaling = threading.Thread(target=scale)
    scaling.start()
    outputs = [it.communicate(timeout=seconds + 60)[0] for it in load]
    scaling.join()
    for output in outputs[:2]:
        assert int(re.search(r"(\d+) requests in", output)[1]) > 10 * seconds, output  # type: ignore[index]
        assert "Socket errors" not in output, output
        assert "Non-2xx" not in output, output
    for output in outputs[2:]:
        count, bad = map(int, output.split())
        assert (count > 10 * seconds, bad) == (True, 0)


def scale() -> None:
    lifecycle.scale(OUTSIDE, "web", 5)
    lifecycle.scale(OUTSIDE, "web", 3)


def wrk(lab: Lab, url: str, seconds: int, connections: int) -> "subprocess.Popen[str]":
    """A connection a request: one that is kept would outlive its instance's drain."""
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-H", "Connection: close"]
    return started(lab, ["wrk", *options, url])


def echo(lab: Lab, address: str, seconds: int) -> "subprocess.Popen[str]":
    """Datagrams, each from a port of its own."""
    return started(lab, [sys.executable, "-c", ECHO, address, str(PORT), str(seconds)])


def started(lab: Lab, command: list[str]) -> "subprocess.Popen[str]":
    line = lab.command("cluster", command)
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment(lab), cwd=ROOT)


def examples() -> list[Any]:
    """Every descriptor of the documentation and of config/."""
    found = [pytest.param(it.read_text(), id=it.name) for it in sorted((ROOT / "config" / "services").glob("*.yaml"))]
    for page in sorted((ROOT / "docs").glob("*.md")):
        texts = re.findall(r"```yaml\n(app:.*?|version:.*?)```", page.read_text(), re.DOTALL)
        found += [pytest.param(text, id=f"{page.name}-{number}") for number, text in enumerate(texts)]
    return found


@pytest.mark.parametrize("text", examples())
def test_every_example_deploys_and_leaves_nothing(three: Lab, tmp_path: Path, text: str) -> None:
    """Pinned addresses of the demo are taken in a lab: the examples' own are others."""
    file = tmp_path / "service.yaml"
    file.write_text(text.replace("10.30.30.30", "10.30.77.77"))
    before = {it["name"] for it in three.manager.picture().services}
    appliance = [sys.executable, "-m", "appliance"]
    run(three, "cluster", *appliance, "deploy", "-f", str(file))
    assert run(three, "cluster", *appliance, "diff", str(file)) == "nothing would change\n"
    run(three, "cluster", *appliance, "undeploy", str(file))
    assert {it["name"] for it in three.manager.picture().services} == before
