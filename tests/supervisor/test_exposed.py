"""Exposed services and health on three real nodes of a real cluster, called from outside the overlay.

hub   192.0.2.254, 2001:db8::fe: the cluster, and the world outside
       ├── node1  192.0.2.1, 2001:db8::1   web0, and an instance that is not exposed anywhere else
       ├── node2  192.0.2.2, 2001:db8::2   web1
       └── node3  192.0.2.3, 2001:db8::3   none
"""

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tests.environment import netns
from tests.environment.netns import Netns
from tests.manager.processes import Manager
from tests.supervisor.answers import answering, call
from tests.supervisor.world import HUB, Node, World, ready, until, world

pytestmark = pytest.mark.root

JOB = "app.ns.web.test"
IDS = [f"65f00000000000000000000{number}" for number in range(1, 4)]
OUTSIDE = {4: HUB, 6: "2001:db8::fe"}
PROTOCOLS = ("tcp", "udp")
PORT = 8080


def address(node: Node, version: int) -> str:
    number = node.name.removeprefix("node")
    return f"192.0.2.{number}" if version == 4 else f"2001:db8::{number}"


@dataclass
class Scene:
    """See the module. ``deploy`` changes what is exposed; each test begins with what it needs."""

    world: World
    manager: Manager
    nodes: list[Node]
    containers: list[Netns]

    def deploy(self, instances: int = 2, **more: Any) -> dict[str, Any]:
        ports = more.pop("ports", {})
        exposed = [{"port": PORT, "to": 80, "protocol": it, **ports} for it in PROTOCOLS]
        return self.manager.deploy(JOB, instances, **{"exposed": exposed, **more})

    def call(self, node: Node, protocol: str = "tcp", version: int = 4, wait: float = 1.0) -> tuple[str, str] | None:
        return call(self.world.hub, protocol, address(node, version), PORT, wait)

    def who(self, node: Node, protocol: str = "tcp", version: int = 4, times: int = 6) -> set[str]:
        """Who answers some calls of a node's port; "" for nobody."""
        found = (self.call(node, protocol, version) for _ in range(times))
        return {"" if it is None else it[0] for it in found}

    def opened(self, node: Node) -> set[int]:
        return {it["port"] for it in node.api.status()["exposed"]["ports"]}

    def instance(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self.manager.service(JOB)["instances"][number]
        return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two of three nodes have an instance."""
    netns.remove_abandoned()
    with world(tmp_path_factory.mktemp("exposed")) as made, ExitStack() as stack:
        made.hub.ip("addr", "add", "2001:db8::fe/64", "dev", "br0", "nodad")
        manager = made.manager()
        manager.deploy(JOB, 2)
        nodes = [made.member(identity, health={"commands": True}) for identity in IDS]
        for node in nodes:
            node.namespace.ip("addr", "add", f"{address(node, 6)}/64", "dev", "up0", "nodad")
            node.start()
            ready(node)
        containers = [made.container() for _ in range(3)]
        for number in range(2):
            nodes[number].api.attach(JOB, number, {"netns": containers[number].name})
        for number, container in enumerate(containers):
            stack.enter_context(answering(container, f"web{number}", 80))
        yield Scene(made, manager, nodes, containers)


def test_a_service_answers_on_every_node_also_where_no_instance_runs(scene: Scene) -> None:
    for node in scene.nodes:
        node.namespace.command("nft", "add table ip younger")
    before = [rules(node) for node in scene.nodes]
    assert all(it.index("edge-appliance") < it.index("younger") for it in before)
    scene.deploy()
    for node in scene.nodes:
        until(lambda node=node: scene.opened(node) == {PORT}, f"{node.name} has the port")  # type: ignore[misc]
    for node in scene.nodes:
        for protocol in PROTOCOLS:
            for version in (4, 6):
                assert scene.who(node, protocol, version) == {"web0", "web1"}, (node.name, protocol, version)
    scene.manager.deploy(JOB, 2)
    for node, rules_before in zip(scene.nodes, before, strict=True):
        until(lambda node=node: scene.opened(node) == set(), f"{node.name} has no port")  # type: ignore[misc]
        assert scene.call(node, wait=0.3) is None
        until(lambda node=node, it=rules_before: rules(node) == it, "rules as before")  # type: ignore[misc]


def rules(node: Node) -> str:
    """The kernel's rule set, byte for byte, also those of a table that is younger than ours."""
    return node.namespace.command("nft", "list", "ruleset")


def test_chosen_nodes_and_the_clients_own_address(scene: Scene) -> None:
    one, two, three = scene.nodes
    scene.deploy(ports={"nodes": "hosting", "prefer": "local"})
    until(lambda: scene.opened(one) == scene.opened(two) == {PORT}, "the hosting nodes have the port")
    for version in (4, 6):
        for protocol in PROTOCOLS:
            assert scene.call(one, protocol, version) == ("web0", OUTSIDE[version])
            assert scene.call(two, protocol, version) == ("web1", OUTSIDE[version])
    assert scene.opened(three) == set()
    scene.deploy(ports={"nodes": [IDS[2]]})
    until(lambda: scene.opened(three) == {PORT} and not scene.opened(one), "the listed node has the port")
    assert scene.who(three) == {"web0", "web1"}
    assert scene.call(one, wait=0.3) is None


def test_two_instances_of_one_node_take_turns_without_the_overlay(scene: Scene) -> None:
    one = scene.nodes[0]
    scene.deploy(3, ports={"prefer": "local"})
    one.api.attach(JOB, 2, {"netns": scene.containers[2].name})
    try:
        until(lambda: scene.who(one) == {"web0", "web2"}, "both are chosen")
        assert [scene.call(one, "udp", 6) is not None for _ in range(4)] == [True] * 4
    finally:
        one.api.detach(JOB, 2)
        scene.deploy(2)
    until(lambda: scene.who(one) == {"web0", "web1"}, "by policy again")


def test_a_port_of_another_service_is_refused(scene: Scene) -> None:
    scene.deploy()
    body = {"app": "app", "namespace": "ns", "service": "other", "service_namespace": "test"}
    wish = {**body, "exposed": [{"port": PORT, "nodes": [IDS[0]]}]}
    status, answer = scene.manager.call("PUT", "/v1/services/app.ns.other.test", wish)
    assert (status, answer) == (409, {"error": f"exposed.0.port: expected a port that is free, {PORT} is {JOB}'s"})


def test_a_port_that_a_program_has_is_left_to_it(scene: Scene) -> None:
    one = scene.nodes[0]
    scene.manager.deploy(JOB, 2)
    until(lambda: scene.opened(one) == set(), "no port")
    with answering(one.namespace, "daemon", PORT):
        scene.deploy()
        until(lambda: one.api.status()["exposed"]["refused"], "it is refused")
        assert scene.call(one) == ("daemon", HUB)
    until(lambda: scene.opened(one) == {PORT}, "it is opened when it is free")
    assert scene.who(one) == {"web0", "web1"}


def test_a_drained_instance_leaves_at_once(scene: Scene) -> None:
    scene.deploy(states={0: "draining"})
    for node in scene.nodes:
        until(lambda node=node: scene.who(node) == {"web1"}, "it is not chosen")  # type: ignore[misc]
    scene.deploy()
    for node in scene.nodes:
        until(lambda node=node: scene.who(node) == {"web0", "web1"}, "it is chosen again")  # type: ignore[misc]


CHECKS: dict[str, dict[str, Any]] = {
    "tcp": {"tcp": 81},
    "http": {"http": {"port": 81, "path": "/healthz"}},
    "command": {"command": ["nc", "-z", "127.0.0.1", "81"]},
}


@contextmanager
def healthy(container: Netns) -> Iterator[None]:
    """Something that a check of any kind finds good: HTTP on port 81."""
    program = (
        "from http.server import *\n"
        "class H(BaseHTTPRequestHandler):\n"
        "  def do_GET(self): self.send_response(204); self.end_headers()\n"
        "ThreadingHTTPServer(('', 81), H).serve_forever()\n"
    )
    line = ["ip", "netns", "exec", container.name, "python3", "-c", program]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            yield
        finally:
            child.kill()


@pytest.mark.parametrize("kind", CHECKS)
def test_a_failing_check_takes_the_instance_out_and_back_in(scene: Scene, kind: str) -> None:
    """Within its threshold: 2 bad checks, 0.2 s apart, each refused at once; what is left is for a busy machine."""
    if kind == "command":
        CHECKS[kind] = {"command": ["sh", "-c", "ss -ltn | grep -q ':81 '"]}
    health = {**CHECKS[kind], "interval": 0.2, "timeout": 5, "fall": 2, "rise": 1, "panic": 0}
    three = scene.nodes[2]
    with healthy(scene.containers[0]):
        with healthy(scene.containers[1]):
            scene.deploy(health=health)
            until(lambda: [scene.instance(it)["healthy"] for it in (0, 1)] == [True, True], "both are good")
            until(lambda: scene.who(three) == {"web0", "web1"}, "both are chosen")
        began = time.monotonic()
        until(lambda: scene.who(three, times=4) == {"web0"}, "the bad one is out", 5)
        assert time.monotonic() - began < 2 * 0.2 + 3
        assert (scene.instance(1)["healthy"], scene.instance(1)["chosen"]) == (False, "down")
        assert any(not it["good"] for it in scene.nodes[1].api.status()["checks"].values())
        with healthy(scene.containers[1]):
            until(lambda: scene.who(three) == {"web0", "web1"}, "it is back in", 5)
    scene.deploy()


def test_in_panic_all_are_chosen(scene: Scene) -> None:
    """Nobody is good, or fewer than are wanted: a check that is wrong must not end the service."""
    three = scene.nodes[2]
    scene.deploy(health={"tcp": 81, "interval": 0.2, "fall": 1, "panic": 60})
    until(lambda: [scene.instance(it)["healthy"] for it in (0, 1)] == [False, False], "both are bad")
    assert scene.who(three) == {"web0", "web1"}
    with healthy(scene.containers[0]):
        until(lambda: scene.instance(0)["healthy"], "one is good")
        assert scene.who(three) == {"web0", "web1"}, "half of them is less than 60 percent"
        scene.deploy(health={"tcp": 81, "interval": 0.2, "fall": 1, "panic": 50})
        until(lambda: scene.who(three) == {"web0"}, "half of them is enough now")
    scene.deploy()


def test_a_node_that_is_started_again_has_its_ports(scene: Scene) -> None:
    three = scene.nodes[2]
    scene.deploy()
    until(lambda: scene.opened(three) == {PORT}, "it has the port")
    three.stop()
    three.start()
    until(lambda: scene.opened(three) == {PORT}, "it has the port again")
    assert scene.who(three, "udp", 6) == {"web0", "web1"}


def test_udp_goes_on_while_an_instance_comes_and_goes(scene: Scene) -> None:
    """Every datagram of clients of their own ports is answered; the instance that goes is drained before."""
    two, failures = scene.nodes[1], []
    scene.deploy(2)
    until(lambda: scene.who(two, "udp") == {"web0", "web1"}, "both are chosen")
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            if scene.call(two, "udp") is None:
                failures.append(time.monotonic())

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        scene.deploy(3)
        scene.nodes[2].api.attach(JOB, 2, {"netns": scene.containers[2].name})
        until(lambda: "web2" in scene.who(two, "udp"), "the new one is chosen")
        scene.deploy(3, states={2: "draining"})
        until(lambda: scene.who(two, "udp", times=9) == {"web0", "web1"}, "it is not chosen any more")
    finally:
        stop.set()
        asking.join()
        scene.deploy(2)
        scene.nodes[2].api.detach(JOB, 2)
    assert failures == []


HOLDING = """
from socketserver import *
class Echo(BaseRequestHandler):
    def handle(self):
        while said := self.request.recv(1):
            self.request.sendall(said)
ThreadingTCPServer.daemon_threads = True
ThreadingTCPServer(("", 82), Echo).serve_forever()
"""


def test_an_undeployed_service_drains(scene: Scene) -> None:
    """Its connections go on and new ones are refused, until its time is over; then it is gone, and its ports too."""
    three = scene.nodes[2]
    program = ["ip", "netns", "exec", scene.containers[0].name, "python3", "-c", HOLDING]
    with subprocess.Popen(program) as holding, ExitStack() as stack:
        stack.callback(holding.kill)
        scene.manager.deploy(JOB, 2)
        until(lambda: scene.opened(three) == set() and str(PORT) not in rules(three), "no port, and no rule of one")
        before = rules(three)
        scene.manager.deploy(JOB, 1, exposed=[{"port": PORT + 1, "to": 82}], drain=4)
        until(lambda: scene.opened(three) == {PORT + 1}, "the port is open")
        until(lambda: answers(scene), "it is served")
        sock = scene.world.hub.call(lambda: connected(three))
        stack.callback(sock.close)
        assert echoed(sock)
        assert scene.manager.call("DELETE", f"/v1/services/{JOB}")[0] == 202
        until(lambda: not answers(scene), "no new connection", 3)
        assert echoed(sock), "the connection that there was goes on"
        assert scene.manager.service(JOB)["leaving"]
        until(lambda: scene.manager.call("GET", f"/v1/services/{JOB}")[0] == 404, "the service is gone")
        until(lambda: not echoed(sock), "and its connections")
        until(lambda: rules(three) == before, "rules as before")


def connected(node: Node) -> socket.socket:
    sock = socket.create_connection((address(node, 4), PORT + 1), timeout=1)
    sock.settimeout(1)
    return sock


def answers(scene: Scene) -> bool:
    """Whether a new connection to the third node's port is answered."""
    try:
        with scene.world.hub.call(lambda: connected(scene.nodes[2])) as sock:
            return echoed(sock)
    except OSError:
        return False


def echoed(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"?")
        return sock.recv(1) == b"?"
    except OSError:
        return False
