"""The resolver beside a real supervisor: started, fed from the cluster, replaced."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.environment.netns import Netns
from tests.supervisor.world import Node, World, ready, until

pytestmark = pytest.mark.root

JOB, OTHER_JOB = "app.ns.web.test", "app.ns.shop.test"
ONE = "65f0000000000000000000a1"
RR = "10.30.30.30"


def dig(container: Netns, gateway: str, *arguments: str) -> list[str]:
    """What dig prints in a container."""
    return container.command("dig", f"@{gateway}", "+tries=1", "+time=4", "+short", *arguments).split()


def static(directory: Path, address: str) -> Path:
    """A file with one service."""
    file = directory / f"services-{address}.json"
    service_ips = [{"IpType": "RR", "Address": address}, {"IpType": "instance_ip", "Address": "10.30.0.1"}]
    instance: dict[str, Any] = {"instance_number": 0, "namespace_ip": "10.18.0.2", "host_ip": "192.0.2.1"}
    instance |= {"host_port": 50103, "service_ip": service_ips}
    more = {"ports": [{"port": 80}], "metadata": {"version": "3"}}
    file.write_text(json.dumps([{"app_name": JOB, "instance_list": [instance], **more}]))
    return file


def test_names_of_a_cluster(hub: World) -> None:
    manager = hub.manager()
    manager.deploy(JOB, 1, service_ips={"rr": {"v4": RR}})
    manager.deploy(OTHER_JOB, 1, service_ips={"rr": {"v4": "10.30.30.31"}})
    node, container = hub.member(ONE).start(), hub.container()
    ready(node)
    attached = node.api.attach(JOB, 0, {"netns": container.name})
    gateway = attached["gateway_v4"]
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers")
    until(lambda: dig(container, gateway, "web.test.app.ns.local") == [RR], "the own service")
    assert dig(container, gateway, "shop.test.app.ns.local") == ["10.30.30.31"], "asked the cluster"
    assert dig(container, gateway, "none.test.app.ns.local") == []
    explained = node.api.name("web.test.app.ns.local")
    assert explained["job"] == JOB
    assert "policy rr" in explained["why"]
    assert explained["behind"][0]["backends"] == [attached["address_v4"]]
    manager.deploy("app.ns.needed.test", 1, service_ips={"rr": {"v4": "10.30.30.32"}}, ports=[{"port": 80}])
    manager.deploy(JOB, 1, service_ips={"rr": {"v4": RR}}, needs=["app.ns.needed.test"])
    until(lambda: node.api.name("needed.test.app.ns.local")["from"] == "names", "fetched because it is needed")
    assert dig(container, gateway, "needed.test.app.ns.local", "SRV") == ["0", "0", "80", "needed.test.app.ns.local."]
    assert node.stop() == 0
    until(lambda: node.processes() == [], "nothing runs on")


def unit(hub: World) -> tuple[Node, Netns, str]:
    """A node without a cluster, and a container on it."""
    static(hub.directory, RR)
    node = hub.node(
        network={"subnet_v4": "10.18.0.0/26"}, tables={"static": hub.directory / f"services-{RR}.json"}
    ).start()
    container = hub.container()
    attached = node.api.attach(JOB, 0, {"netns": container.name})
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers")
    return node, container, attached["gateway_v4"]


def test_a_resolver_that_dies_is_replaced(hub: World) -> None:
    node, container, gateway = unit(hub)
    assert dig(container, gateway, "web.test.app.ns.local") == [RR]
    assert dig(container, gateway, "web.test.app.ns.local", "TXT") == ['"version=3"']
    (before,) = node.resolvers()
    status = Path(f"/proc/{before}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    os.kill(before, signal.SIGKILL)
    until(lambda: node.api.status()["naming"]["restarts"] == 1, "started again")
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers")
    assert dig(container, gateway, "web.test.app.ns.local") == [RR]


def test_names_outlive_their_supervisor_and_the_next_one_takes_over(hub: World) -> None:
    node, container, gateway = unit(hub)
    (before,) = node.resolvers()
    node.stop(signal.SIGKILL)
    assert dig(container, gateway, "web.test.app.ns.local") == [RR]
    node.start()
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers")
    until(lambda: before not in node.resolvers(), "the old one leaves")
    assert dig(container, gateway, "web.test.app.ns.local") == [RR]


def test_a_resolver_that_is_not_wanted_any_more_leaves(hub: World) -> None:
    node, _, _ = unit(hub)
    assert len(node.resolvers()) == 1
    node.stop(signal.SIGUSR2)
    node.settings["naming"] = {"enabled": False}
    node.start()
    until(lambda: node.resolvers() == [], "it leaves")


def test_a_named_container_finds_names_by_their_first_label(hub: World) -> None:
    node, container, gateway = unit(hub)
    file = Path("/etc/netns") / container.name / "resolv.conf"
    assert f"nameserver {gateway}\nsearch test.app.ns.local" in file.read_text()
    assert RR in container.command("getent", "ahostsv4", "web")
    assert RR in container.command("getent", "ahostsv4", "web.test.app.ns.local")
    node.api.detach(JOB, 0)
    assert not file.parent.exists()
