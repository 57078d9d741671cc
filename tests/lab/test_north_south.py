"""From outside the overlay into a lab: every example of a descriptor, and load while instances come and go.

The world outside is the cluster's host: it is on the underlay and in no subnet of a node.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from appliance.cli import main
from appliance.cluster import topics
from appliance.lab import lifecycle, network, plan
from appliance.lab.lifecycle import Lab
from tests.conftest import ROOT
from tests.lab.conftest import CHANGING
from tests.lab.helpers import environment, run, until

pytestmark = pytest.mark.root

PORT = 30999


@pytest.fixture(scope="module")
def exposed(three: Lab) -> Iterator[Lab]:
    """The lab of three nodes while its demo service is exposed on all of them."""
    ports = [{"port": PORT, "to": plan.WEB_PORT, "protocol": it} for it in ("tcp", "udp")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.WEB, "exposed", ports)
        three.manager.deploy(plan.descriptors(three.plan.spec))
        until(lambda: [opened(three, node) for node in three.plan.nodes] == [4, 4, 4], "the ports are open")
        yield three
    three.manager.deploy(plan.descriptors(three.plan.spec))
    until(lambda: [opened(three, node) for node in three.plan.nodes] == [0, 0, 0], "the ports are closed")


def opened(lab: Lab, node: plan.Node) -> int:
    """How many ports of both protocols and families a node has open."""
    return len(lab.api(node).status()["exposed"]["ports"])


def targets(lab: Lab) -> list[str]:
    """The exposed port on each node, in both families, as URLs have it."""
    both = (address for node in lab.plan.nodes for address in (node.underlay_v4, node.underlay_v6))
    return [f"[{it}]:{PORT}" if it.version == 6 else f"{it}:{PORT}" for it in map(ip_address, map(str, both))]


def test_curl_reaches_instances_on_all_nodes_through_each_node(exposed: Lab) -> None:
    for target in targets(exposed):
        urls = [f"http://{target}/"] * 6
        said = run(exposed, "cluster", "curl", "-sS", "--no-keepalive", "-H", "Connection: close", *urls)
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


def test_load_from_outside_while_instances_scale(exposed: Lab, long: bool) -> None:
    """Not a call is lost: TCP by wrk, and UDP, of both families. --long: 30 s and 200 connections."""
    seconds, connections = (30, 200) if long else (4, 20)
    one, two, three = exposed.plan.nodes
    load = [
        wrk(exposed, f"http://{one.underlay_v4}:{PORT}/", seconds, connections // 2),
        wrk(exposed, f"http://[{two.underlay_v6}]:{PORT}/", seconds, connections // 2),
        echo(exposed, str(three.underlay_v4), seconds),
        echo(exposed, str(one.underlay_v6), seconds),
    ]
    time.sleep(0.3)
    with ThreadPoolExecutor() as pool:
        scaling = pool.submit(scale)
        outputs = [it.communicate(timeout=seconds + 60)[0] for it in load]
    scaling.result()
    for output in outputs[:2]:
        assert int(re.search(r"(\d+) requests in", output)[1]) > 10 * seconds, output  # type: ignore[index]
        assert "Socket errors" not in output, output
        assert "Non-2xx" not in output, output
    counts, lost = zip(*(map(int, output.split()) for output in outputs[2:]), strict=True)
    assert min(counts) > 10 * seconds
    assert max(lost) == 0


def scale() -> None:
    lifecycle.scale(CHANGING, "web", 5)
    lifecycle.scale(CHANGING, "web", 3)


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
    """As the commands do it. The demo has the address that an example pins, so here it is another."""
    file = tmp_path / "service.yaml"
    file.write_text(text.replace("10.30.30.30", "10.30.77.77"))

    def said(*arguments: str) -> str:
        done = network.inside(three.namespace("cluster"), lambda: CliRunner().invoke(main, arguments))
        assert done.exit_code == 0, done.output
        return str(done.output)

    before = {it["name"] for it in three.manager.picture().services}
    said("deploy", "-f", str(file))
    assert said("diff", str(file)) == "nothing would change\n"
    said("undeploy", str(file))
    assert {it["name"] for it in three.manager.picture().services} - ingress() == before - ingress()


def ingress() -> set[str]:
    """Nodes that have ports are there themselves, as long as they have some."""
    return {topics.ingress_job(node.id) for node in plan.topology(plan.Spec(nodes=3)).nodes}
