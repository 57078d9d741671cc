"""Node ports and egress of a real node, seen from outside, from its containers and from the node itself.

hub   br0 192.0.2.254, 2001:db8::fe ── up0 192.0.2.1, 2001:db8::1   node   10.18.0.0/26, fc00::/120
"""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from appliance.client import ApiError
from appliance.supervisor import ports
from tests.environment import netns, others
from tests.environment.netns import Netns
from tests.supervisor.answers import answering, call
from tests.supervisor.world import HUB, Node, World, until, world

pytestmark = pytest.mark.root

JOB = "app.ns.web.test"
NODE = {4: "192.0.2.1", 6: "2001:db8::1"}
OUTSIDE = {4: HUB, 6: "2001:db8::fe"}
PROTOCOLS = ("tcp", "udp")


@dataclass
class Scene:
    """A node with two containers, each of which answers on port 80 with its name, and the world outside."""

    world: World
    node: Node
    containers: list[Netns]

    @property
    def outside(self) -> Netns:
        return self.world.hub

    @contextmanager
    def mapped(self, text: str, number: int = 0) -> Iterator[dict[str, Any]]:
        """A container with these ports while the block runs, and none afterwards."""
        try:
            yield self.attach(text, number)
        finally:
            self.attach("", number)

    def attach(self, text: str, number: int) -> dict[str, Any]:
        return self.node.api.attach(JOB, number, {"netns": self.containers[number].name}, text)

    def rules(self) -> str:
        """The kernel's, byte for byte but for what others' counters say."""
        listing = self.node.namespace.command("nft", "list", "ruleset")
        return re.sub(r"packets \d+ bytes \d+", "packets", listing)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Whoever changes it, changes it back."""
    netns.remove_abandoned()
    with world(tmp_path_factory.mktemp("ports")) as made:
        node = made.node(network={"subnet_v4": "10.18.0.0/26", "subnet_v6": "fc00::/120"})
        made.hub.ip("addr", "add", "2001:db8::fe/64", "dev", "br0", "nodad")
        node.namespace.ip("addr", "add", "2001:db8::1/64", "dev", "up0", "nodad")
        node.namespace.ip("route", "add", "default", "via", "2001:db8::fe")
        node.start()
        found = Scene(made, node, [made.container(), made.container()])
        for number in range(2):
            found.attach("", number)
        with answering(found.containers[0], "web0", 80), answering(found.containers[1], "web1", 80):
            yield found


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_port_of_the_node_leads_to_the_container_which_sees_its_client(
    scene: Scene, protocol: str, version: int
) -> None:
    with scene.mapped(f"8080:80/{protocol}") as attached:
        assert attached["ports"] == f"8080:80/{protocol}"
        assert call(scene.outside, protocol, NODE[version], 8080) == ("web0", OUTSIDE[version])
        assert call(scene.node.namespace, protocol, NODE[version], 8080) == ("web0", NODE[version])
        found = call(scene.containers[1], protocol, NODE[version], 8080)
        assert found is not None
        assert found[0] == "web0", "a container on the same node"
    assert call(scene.outside, protocol, NODE[version], 8080, 0.3) is None


@pytest.mark.parametrize("version", [4, 6])
def test_only_this_nodes_addresses_are_meant(scene: Scene, version: int) -> None:
    """What goes out to the same port elsewhere is not taken away, and leaves with the uplink's address."""
    with scene.mapped("8080:80;8080:80/udp"), answering(scene.outside, "outside", 8080):
        for protocol in PROTOCOLS:
            for container in scene.containers:
                assert call(container, protocol, OUTSIDE[version], 8080) == ("outside", NODE[version])
            assert call(scene.node.namespace, protocol, OUTSIDE[version], 8080) == ("outside", NODE[version])


def test_what_somebody_has_is_refused_before_anything_changes(scene: Scene) -> None:
    before = scene.rules()
    with scene.mapped("8080:80;8081:80"):
        during = scene.rules()
        with pytest.raises(ApiError, match="8081/tcp is another container's"):
            scene.attach("8082:80;8081:80", 1)
        assert scene.rules() == during
    with answering(scene.node.namespace, "daemon", 8083):
        for text in ("8083:80", "8083:80/udp"):
            with pytest.raises(ApiError, match=f"somebody listens on :: 8083/{text.rpartition('/')[2] or 'tcp'}"[:24]):
                scene.attach(text, 1)
    with pytest.raises(ApiError, match="expected another port than the tunnel's own"):
        scene.attach("50103/udp", 1)
    assert scene.rules() == before


def test_a_container_that_cannot_have_its_ports_is_not_attached(scene: Scene) -> None:
    third = scene.world.container()
    with scene.mapped("8080:80"), pytest.raises(ApiError, match="another container's"):
        scene.node.api.attach(JOB, 2, {"netns": third.name}, "8080:80")
    assert len(scene.node.api.attachments()) == 2
    assert [it["ifname"] for it in third.json("link") if it["ifname"] != "lo"] == []


def test_nothing_is_left_of_a_deployment(scene: Scene) -> None:
    before, third = scene.rules(), scene.world.container()
    scene.node.api.attach(JOB, 2, {"netns": third.name}, "8080:80;8081:80;5354:53/udp")
    assert scene.rules() != before
    scene.node.api.detach(JOB, 2)
    assert scene.rules() == before


def test_a_client_that_never_stops_sending_follows_its_port(scene: Scene) -> None:
    with scene.outside.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.settimeout(0.2)
        sock.connect((NODE[4], 8080))

        def who() -> str:
            try:
                sock.send(b"?")
                return sock.recv(2048).decode().partition(" ")[0]
            except OSError:
                return ""

        assert who() == ""
        for number in (0, 1):
            with scene.mapped("8080:80/udp", number):
                expected = f"web{number}"
                until(lambda: who() == expected, "the port leads there", 2)  # noqa: B023
        until(lambda: who() == "", "the port leads nowhere", 2)


def test_a_flush_by_somebody_else_is_made_good(scene: Scene) -> None:
    with scene.mapped("8080:80"):
        before, restored = scene.rules(), scene.node.api.status()["firewall"]["restored"]
        scene.node.namespace.command("nft", "flush", "ruleset")
        until(lambda: scene.rules() == before, "our table is back", 5)
        assert call(scene.outside, "tcp", NODE[4], 8080) == ("web0", HUB)
        assert scene.node.api.status()["firewall"]["restored"] == restored + 1


@pytest.mark.parametrize("name", others.NAMES)
def test_others_firewalls_break_nothing_and_lose_nothing(scene: Scene, name: str) -> None:
    before = scene.rules()
    others.leave(scene.node.namespace, name)
    with_theirs = scene.rules()
    try:
        with scene.mapped("8080:80;8080:80/udp"), answering(scene.outside, "outside", 8090):
            if name != "podman":
                until(lambda: "accept comment" in scene.rules(), "our links are accepted", 5)
            for version in (4, 6):
                assert call(scene.outside, "tcp", NODE[version], 8080) == ("web0", OUTSIDE[version])
                assert call(scene.containers[0], "udp", OUTSIDE[version], 8090) == ("outside", NODE[version])
        if name == "docker":
            assert call(scene.outside, "tcp", NODE[4], 9000, 0.3) is None, "Docker's own port stays Docker's"
        ours = re.compile('.*accept comment "edge-appliance.*\n')
        assert ours.sub("", scene.rules()) == ours.sub("", with_theirs)
    finally:
        scene.node.namespace.command("nft", "flush", "ruleset")
        until(lambda: scene.rules() == before, "only our table is left", 5)


def test_what_is_in_force_outlives_the_supervisor(scene: Scene) -> None:
    with scene.mapped("8080:80;5354:80/udp"):
        before = scene.rules()
        scene.node.stop()
        assert scene.rules() == before
        scene.node.start()
        assert {it["ports"] for it in scene.node.api.attachments()} == {"8080:80/tcp;5354:80/udp", ""}
        assert scene.rules() == before
        assert call(scene.outside, "tcp", NODE[4], 8080) == ("web0", HUB)


def test_containers_are_reached_through_node_ports_alone(scene: Scene) -> None:
    inside = scene.node.api.attachments()[0]["address_v4"]
    scene.outside.ip("route", "add", "10.18.0.0/26", "via", NODE[4])
    try:
        assert call(scene.outside, "tcp", inside, 80, 0.3) is None
        with untracked(scene.node.namespace, "10.18.0.0/26"):
            assert call(scene.outside, "tcp", inside, 80, 0.3) is None, "also what the connection table does not know"
            assert call(scene.outside, "udp", inside, 80, 0.3) is None
    finally:
        scene.outside.ip("route", "del", "10.18.0.0/26")


@contextmanager
def untracked(namespace: Netns, network: str) -> Iterator[None]:
    """Somebody keeps these packets out of the connection table while the block runs."""
    rules = f"ip daddr {network} notrack; ip saddr {network} notrack;"
    head = "type filter hook prerouting priority raw;"
    namespace.command("nft", f"table ip theirs {{ chain c {{ {head} {rules} }}; }}")
    try:
        yield
    finally:
        namespace.command("nft", "delete table ip theirs")


def test_egress_by_several_uplinks_and_off(scene: Scene) -> None:
    file, namespace = scene.node.directory / "appliance.toml", scene.node.namespace
    scene.outside.ip("link", "add", "second", "type", "veth", "peer", "name", "up1", "netns", namespace.name)
    scene.outside.ip("addr", "add", "198.51.100.254/24", "dev", "second")
    scene.outside.ip("link", "set", "second", "up")
    namespace.ip("addr", "add", "198.51.100.1/24", "dev", "up1")
    namespace.ip("link", "set", "up1", "up")
    text = file.read_text()
    try:
        with answering(scene.outside, "outside", 8090):
            assert call(scene.containers[0], "tcp", HUB, 8090) == ("outside", NODE[4])
            assert call(scene.containers[0], "tcp", "198.51.100.254", 8090) == ("outside", "198.51.100.1")
            file.write_text(text.replace("uplinks = []", 'uplinks = ["up1"]'))
            assert scene.node.api.reload() == ["firewall.uplinks"]
            assert call(scene.containers[0], "tcp", HUB, 8090, 0.3) is None, "nobody outside knows the way back"
            assert call(scene.containers[0], "tcp", "198.51.100.254", 8090) == ("outside", "198.51.100.1")
            file.write_text(text.replace("egress = true", "egress = false"))
            assert scene.node.api.reload() == ["firewall.egress", "firewall.uplinks"]
            assert call(scene.containers[0], "tcp", "198.51.100.254", 8090, 0.3) is None
    finally:
        file.write_text(text)
        scene.node.api.reload()
        scene.outside.ip("link", "del", "second")


def test_removal_takes_away_what_is_ours_and_nothing_else(scene: Scene) -> None:
    namespace = scene.world.container()
    others.leave(namespace, "docker")
    before = namespace.command("nft", "list", "ruleset")
    namespace.command("nft", 'insert rule ip filter FORWARD iifname "x" accept comment "edge-appliance t"')
    namespace.command("nft", "add table inet edge-appliance")
    namespace.run(lambda: ports.remove("edge-appliance"))
    assert namespace.command("nft", "list", "ruleset") == before
