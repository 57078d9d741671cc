"""A NodeEngine, as it speaks over its socket, with a node of ours and a real cluster."""

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.supervisor.answers import answering
from tests.supervisor.answers import call as answer
from tests.supervisor.world import HUB, MQTT_PORT, Node, World, ping, ready, until

pytestmark = pytest.mark.root

JOB, ONE, TWO = "app.ns.web.test", "65f0000000000000000000a1", "65f0000000000000000000b2"


class Connection(http.client.HTTPConnection):
    """HTTP/1.1 over a unix socket, and 10 s for every call."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost:0", timeout=10)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def call(path: Path, target: str, body: object, method: str = "POST") -> tuple[int, bytes, str]:
    """Status, body and content type."""
    connection = Connection(path)
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, target, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read(), response.getheader("Content-Type", "")
    finally:
        connection.close()


def deployment(pid: int, number: int = 0, **more: Any) -> dict[str, Any]:
    return {"pid": pid, "serviceName": JOB, "instanceNumber": number, "portMappings": ""} | more


def engine(hub: World) -> tuple[Node, Path]:
    """A node that waits for its NodeEngine, which expects it at a path of its own."""
    path = hub.directory / "netmanager.sock"
    return hub.node(api={"nodeengine": path}, cluster={"port": MQTT_PORT}).start(), path


REGISTRATION = {"client_id": ONE, "cluster_address": HUB}


def test_an_engine_registers_deploys_and_undeploys(hub: World) -> None:
    manager = hub.manager()
    manager.deploy(JOB, 2)
    node, path = engine(hub)
    container = hub.container()
    with container.process() as pid:
        assert call(path, "/container/deploy", deployment(pid))[:2] == (400, b""), "nobody registered yet"
        assert call(path, "/container/undeploy", deployment(-1))[:2] == (400, b"")
        assert call(path, "/register", REGISTRATION)[:2] == (200, b"")
        assert call(path, "/register", REGISTRATION)[:2] == (200, b"")
        assert call(path, "/register", REGISTRATION | {"client_id": TWO})[:2] == (400, b"")
        status, body, kind = call(path, "/container/deploy", deployment(pid))
        assert (status, kind.partition(";")[0]) == (200, "application/json")
        assert body.endswith(b"\n")
        assert json.loads(body) == {"serviceName": JOB, "nsAddress": "10.18.0.2", "nsAddressv6": "fc00::2"}
        until(lambda: manager.service(JOB)["instances"][0]["status"] == "up", "announced")
        assert ping(container, "10.18.0.1")
        for target in ("/container/undeploy", "/docker/undeploy", "/unikernel/undeploy"):
            assert call(path, target, deployment(-1))[:2] == (200, b"")
        assert node.api.attachments() == []


def test_an_engines_port_mappings(hub: World) -> None:
    """The first of two containers that want a port has it, and its client is seen; with the container it is free."""
    hub.manager().deploy(JOB, 2)
    node, path = engine(hub)
    assert call(path, "/register", REGISTRATION)[0] == 200
    containers = [hub.container(), hub.container()]
    before = node.namespace.command("nft", "list", "ruleset")
    with (
        containers[0].process() as one,
        containers[1].process() as two,
        answering(containers[0], "web0", 80),
        answering(containers[1], "web1", 80),
    ):
        wanted = "8080:80;8080:80/udp;8081:80/tcp"
        assert call(path, "/container/deploy", deployment(one, 0, portMappings=wanted))[0] == 200
        for protocol in ("tcp", "udp"):
            assert answer(hub.hub, protocol, node.address, 8080) == ("web0", HUB)
        assert call(path, "/container/deploy", deployment(two, 1, portMappings="8081:80"))[:2] == (500, b"")
        assert "8081/tcp is another container's" in node.api.status()["node"]["last_error"]
        assert call(path, "/container/undeploy", deployment(-1, 0))[0] == 200
        assert node.namespace.command("nft", "list", "ruleset") == before
        assert call(path, "/container/deploy", deployment(two, 1, portMappings="8081:80"))[:1] == (200,)
        assert answer(hub.hub, "tcp", node.address, 8081) == ("web1", HUB)


@pytest.mark.parametrize("node_id", [ONE, TWO])
def test_a_registration_is_remembered_and_gives_way_to_another(hub: World, node_id: str) -> None:
    hub.manager()
    node, path = engine(hub)
    assert call(path, "/register", REGISTRATION)[0] == 200
    node.stop()
    node.start()
    assert node.api.cluster()["node"] == ONE
    assert call(path, "/register", REGISTRATION | {"client_id": node_id})[0] == 200
    assert node.api.cluster()["node"] == node_id
    ready(node)


def test_what_is_refused(hub: World) -> None:
    hub.manager().deploy(JOB, 2)
    node, path = engine(hub)
    for wrong in (b"{", {"client_id": 7}, {"client_id": "web"}, {}):
        assert call(path, "/register", wrong)[:2] == (400, b"")
    assert call(path, "/register", REGISTRATION)[0] == 200
    for wrong in (b"{", {"pid": 1}, deployment(1) | {"pid": "1"}, deployment(1, -1)):
        assert call(path, "/container/deploy", wrong)[:2] == (400, b"")
    for wrong in (
        deployment(2**22 - 1),
        deployment(1, serviceName="web"),
        deployment(1, portMappings="80,81"),
        deployment(1, portMappings="50103/udp"),
    ):
        assert call(path, "/container/deploy", wrong)[:2] == (500, b"")
    assert "expected another port than the tunnel's own" in node.api.status()["node"]["last_error"]
    assert call(path, "/unikernel/deploy", deployment(0, portMappings="50103:80/udp"))[:2] == (500, b"")
    assert call(path, "/nothing", {})[0] == 404
    assert call(path, "/register", b"", "GET")[0] == 405
    assert call(path, "/register/", REGISTRATION)[0] == 301
    assert node.api.attachments() == []


def test_a_unikernel_has_a_namespace_until_it_is_undeployed(hub: World) -> None:
    hub.manager().deploy(JOB, 1)
    _, path = engine(hub)
    assert call(path, "/register", REGISTRATION)[0] == 200
    namespace = Path(f"/run/netns/{JOB}.instance.0")
    status, body, _ = call(path, "/unikernel/deploy", deployment(0))
    assert (status, json.loads(body)["nsAddressv6"]) == (200, "fc00::2")
    assert namespace.exists()
    for _ in range(2):
        assert call(path, "/unikernel/undeploy", deployment(-1))[:2] == (200, b"")
    assert not namespace.exists()


def test_without_a_cluster_it_answers_in_time_and_goes_on_waiting(hub: World) -> None:
    node, path = engine(hub)
    began = time.monotonic()
    assert call(path, "/register", REGISTRATION)[:2] == (500, b"")
    assert time.monotonic() - began < 9.5
    hub.manager()
    ready(node)
    assert call(path, "/register", REGISTRATION)[:2] == (200, b"")


def test_deployments_run_side_by_side(hub: World) -> None:
    hub.manager().deploy(JOB, 8)
    node, path = engine(hub)
    assert call(path, "/register", REGISTRATION)[0] == 200
    containers = [hub.container() for _ in range(8)]

    def deploy(number: int) -> bytes:
        with containers[number].process() as pid:
            status, body, _ = call(path, "/container/deploy", deployment(pid, number))
            assert status == 200
            return body

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(deploy, range(8)))) == 8
    assert len(node.api.attachments()) == 8
