"""What a lab consists of: pure, so every size is tried without building one."""

from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from appliance.cluster.manager.addresses import Plan
from appliance.lab.plan import (
    CLIENT_SERVICE,
    INSTANCES_MAX,
    NODES_MAX,
    WEB_SERVICE,
    WEB_V4,
    Setting,
    Spec,
    SpecError,
    descriptors,
    node_config,
    owned,
    prefixes,
    setting,
    topology,
)

SIZES = [(1, 1), (2, 2), (3, 7), (1, 300), (250, 251), (1, INSTANCES_MAX), (NODES_MAX, INSTANCES_MAX)]


@pytest.mark.parametrize(("nodes", "instances"), SIZES)
def test_every_name_and_underlay_address_is_used_once(nodes: int, instances: int) -> None:
    plan = topology(Spec(nodes=nodes, instances=instances))
    assert len(plan.nodes) == nodes
    assert len(plan.web) == instances
    assert len(set(plan.namespaces)) == 2 + nodes + instances + nodes
    for attribute in ("underlay_v4", "underlay_v6", "name"):
        assert len({getattr(it, attribute) for it in plan.hosts}) == 1 + nodes
    assert len({it.id for it in plan.nodes}) == nodes


@pytest.mark.parametrize(("nodes", "instances"), SIZES)
def test_a_nodes_subnet_holds_its_containers(nodes: int, instances: int) -> None:
    plan = topology(Spec(nodes=nodes, instances=instances))
    v4, v6 = prefixes(plan.spec)
    for node in plan.nodes[:20]:
        containers = sum(it.node == node for it in plan.containers)
        assert containers <= 2 ** (32 - v4) - 3
        assert containers <= 2 ** (128 - v6) - 3


def test_the_usual_subnets_are_those_of_a_cluster() -> None:
    assert prefixes(Spec()) == (Plan().prefix_v4, Plan().prefix_v6)


def test_an_instance_that_is_to_go_is_drained() -> None:
    spec = Spec(instances=3)
    web, client = descriptors(spec, draining=topology(spec).web[2:])
    assert (web.instances, web.states, client.states) == (3, {2: "draining"}, {})
    assert descriptors(spec)[0].states == {}


def test_the_services_are_as_large_as_the_lab() -> None:
    web, client = descriptors(Spec(nodes=3, instances=5))
    assert (web.job, web.instances, web.service_ips["rr"].v4) == (WEB_SERVICE, 5, WEB_V4)
    assert (client.job, client.instances, client.service_ips) == (CLIENT_SERVICE, 3, {})


def test_instances_go_round_the_nodes_and_each_node_has_a_client() -> None:
    plan = topology(Spec(nodes=2, instances=3))
    assert [(it.name, it.node.name) for it in plan.containers] == [
        ("web0", "node1"),
        ("web1", "node2"),
        ("web2", "node1"),
        ("client1", "node1"),
        ("client2", "node2"),
    ]
    assert plan.client(2).name == "client2"


@pytest.mark.parametrize("nodes", [1, 2, 1000])
def test_every_generated_configuration_is_valid(nodes: int) -> None:
    plan = topology(Spec(nodes=nodes, instances=nodes))
    for node in (plan.nodes[0], plan.nodes[-1]):
        config = node_config(plan, node, Path("/run/edge-lab/lab") / node.name)
        assert config.node.address == node.underlay_v4
        assert config.network.subnet_v6 == ""
        assert (config.node.id, config.cluster.url) == (node.id, str(plan.cluster.underlay_v4))


def test_tunnels_over_ipv6() -> None:
    plan = topology(Spec(tunnel="v6"))
    assert node_config(plan, plan.nodes[1], Path("/x")).node.address == ip_address("2001:db8::2")


def test_settings_reach_the_configuration() -> None:
    settings = (setting("offload.udp_gso=false"), setting("log.level=debug"), setting("workers.cpus=[0]"))
    plan = topology(Spec(workers=(3,), settings=settings))
    config = node_config(plan, plan.nodes[0], Path("/x"))
    assert (config.offload.udp_gso, config.log.level, config.workers.cpus) == (False, "debug", (0,))
    assert config.workers.count == 3


def test_nodes_may_differ_in_their_workers() -> None:
    plan = topology(Spec(nodes=4, workers=(1, 2)))
    assert [node_config(plan, it, Path("/x")).workers.count for it in plan.nodes] == [1, 2, 2, 2]


@pytest.mark.parametrize("text", ["offload.udp_gso", "udp_gso=false", "=", "a.b.c=1", ""])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"expected section\.key=value"):
        setting(text)


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        (Setting("offload", "udp_gsoo", True), "offload.udp_gsoo"),
        (Setting("tunnel", "port", 0), "tunnel.port"),
        (Setting("offlod", "udp_gso", True), "offlod"),
    ],
)
def test_a_wrong_setting_is_named(chosen: Setting, complaint: str) -> None:
    plan = topology(Spec(settings=(chosen,)))
    with pytest.raises(SpecError, match=f"set: {complaint}"):
        node_config(plan, plan.nodes[0], Path("/x"))


@pytest.mark.parametrize("name", ["", "Lab", "lab-2", "1lab", "a" * 13, "lab\n"])
def test_a_name_that_namespaces_could_confuse_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="name: expected"):
        Spec(name=name)


TOO_MUCH = [{"nodes": 0}, {"nodes": NODES_MAX + 1}, {"instances": 0}, {"mtu": 1279}, {"mtu": 9001}]


@pytest.mark.parametrize("size", TOO_MUCH)
def test_sizes_have_limits(size: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"{next(iter(size))}: expected [0-9]+ to"):
        Spec(**size)


def test_a_lab_owns_its_own_namespaces_and_no_others() -> None:
    plan = topology(Spec(name="lab"))
    assert all(owned("lab", it) for it in plan.namespaces)
    others = topology(Spec(name="lab2")).namespaces
    assert not any(owned("lab", it) for it in (*others, "lab", "lab-", "lab-other", "lab-node1x", "xlab-node1"))
