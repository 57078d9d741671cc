"""What a container sees of the service network: two nodes, real workers, IPv4 and IPv6."""

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from appliance.config import Config
from appliance.lab import measure
from appliance.lab.demo import owning
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import IPERF_PORTS, Family
from tests.lab.helpers import (
    FAMILIES,
    balanced,
    instance_ip,
    link_counter,
    namespace_ip,
    probe,
    program,
    run,
    same,
    until,
)

pytestmark = pytest.mark.root
by_family = pytest.mark.parametrize("family", FAMILIES)

TIMES = 20
SPOOFER_PORT = 1
"""That `spoofer` sends from."""


@by_family
@pytest.mark.parametrize("client", ["client1", "client2"])
def test_calls_go_to_both_instances_alternately(lab: Lab, client: str, family: Family) -> None:
    """Each worker goes round the instances by itself: so in turn where one worker has the calls."""
    calls = probe(lab, client, balanced(family), TIMES)
    workers = flow_workers(lab, client, balanced(family))
    for protocol in ("tcp", "udp"):
        turns: dict[int, list[int]] = {}
        for call in calls:
            if call["protocol"] == protocol:
                turns.setdefault(workers[protocol, call["port"]], []).append(call["instance"])
        for worker, instances in turns.items():
            assert alternate(instances), f"{protocol}: worker {worker}: {instances}"


def flow_workers(lab: Lab, client: str, address: str) -> dict[tuple[str, int], int]:
    """Which worker of a client's node has the flow from a port to an address."""
    node = next(it.node for it in lab.plan.containers if it.name == client)
    return owning(lab.api(node).flows(), address)


def alternate(instances: list[int]) -> bool:
    return all(one != other for one, other in pairwise(instances))


@by_family
@pytest.mark.parametrize("client", ["client1", "client2"])
def test_the_service_sees_the_clients_instance_ip_and_the_client_the_service_ip(
    lab: Lab, client: str, family: Family
) -> None:
    container = next(it for it in lab.plan.containers if it.name == client)
    for call in probe(lab, client, balanced(family), TIMES):
        assert same(call["client"], instance_ip(lab, container, family))
        assert call["client_port"] == call["port"]
        assert same(call["reply_from"], balanced(family))


@by_family
def test_each_instance_has_a_service_ip_of_its_own(lab: Lab, family: Family) -> None:
    for container in lab.plan.web:
        calls = probe(lab, "client1", instance_ip(lab, container, family), 3)
        assert {it["container"] for it in calls} == {container.name}
        assert all(same(it["reply_from"], instance_ip(lab, container, family)) for it in calls)


@by_family
@pytest.mark.parametrize("client", ["client1", "client2"])
def test_ping_to_the_service_and_to_each_instance(lab: Lab, client: str, family: Family) -> None:
    targets = [balanced(family), *(instance_ip(lab, it, family) for it in lab.plan.web)]
    for target in targets:
        echo = measure.ping_result(run(lab, client, *measure.ping_command(target, count=5)))
        assert (echo.sent, echo.received) == (5, 5), target


@by_family
def test_ping_shows_the_service_ip_as_the_answering_one(lab: Lab, family: Family) -> None:
    output = run(lab, "client1", *measure.ping_command(balanced(family), count=3))
    assert output.count(f"bytes from {balanced(family)}: icmp_seq=") == 3


@by_family
def test_large_echoes_are_carried_up_to_the_mtu(lab: Lab, family: Family) -> None:
    headers = 28 if family == "v4" else 48
    for container in lab.plan.web:
        target = instance_ip(lab, container, family)
        run(lab, "client1", "ping", "-nqc3", "-i0.05", "-W2", "-Mdo", f"-s{1450 - headers}", target)


@by_family
@pytest.mark.parametrize("reverse", [False, True], ids=["to", "from"])
def test_iperf3(lab: Lab, family: Family, reverse: bool) -> None:
    web1 = lab.plan.web[1]
    command = measure.iperf_command(instance_ip(lab, web1, family), IPERF_PORTS[0], 1, streams=2, reverse=reverse)
    rate = measure.iperf_result(run(lab, "client1", *command))
    assert rate.bits_per_second > 100e6


@by_family
def test_iperf3_udp(lab: Lab, family: Family) -> None:
    target = instance_ip(lab, lab.plan.web[1], family)
    command = ["iperf3", "-c", target, "-p", str(IPERF_PORTS[1]), "-u", "-b", "20M", "-t", "1", "--json"]
    end = json.loads(run(lab, "client1", *command))["end"]["sum"]
    assert end["packets"] > 1000
    assert end["lost_packets"] == 0


@by_family
def test_an_instance_on_the_same_node_is_reached_without_the_underlay(lab: Lab, family: Family) -> None:
    web0 = lab.plan.web[0]
    before = link_counter(lab, "node1", "uplink", "tx_packets")
    calls = probe(lab, "client1", instance_ip(lab, web0, family), 25)
    assert {it["container"] for it in calls} == {"web0"}
    client = lab.plan.client()
    assert all(same(it["client"], instance_ip(lab, client, family)) for it in calls)
    after = link_counter(lab, "node1", "uplink", "tx_packets")
    assert after - before < 50  # 50 calls are some hundred packets; what the node itself sends meanwhile is a few


@by_family
@pytest.mark.parametrize("caller", ["web0", "web1"])
def test_an_instance_may_call_its_own_service(lab: Lab, family: Family, caller: str) -> None:
    """Hairpin: half of the calls come back to the caller."""
    container = next(it for it in lab.plan.web if it.name == caller)
    calls = probe(lab, caller, balanced(family), TIMES)
    answered = Counter(it["container"] for it in calls)
    assert min(answered["web0"], answered["web1"]) >= TIMES // 2
    assert all(same(it["client"], instance_ip(lab, container, family)) for it in calls)
    assert all(same(it["reply_from"], balanced(family)) for it in calls)


@by_family
def test_an_instance_may_call_itself(lab: Lab, family: Family) -> None:
    web0 = lab.plan.web[0]
    calls = probe(lab, "web0", instance_ip(lab, web0, family), 5)
    assert {it["container"] for it in calls} == {"web0"}
    assert all(same(it["client"], instance_ip(lab, web0, family)) for it in calls)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("10.30.77.77", "unknown-service"),
        ("10.18.9.9", "no-route"),
        ("fdff:2000::77", "unknown-service"),
        ("fc00::9:9", "no-route"),
    ],
)
def test_what_has_no_way_is_dropped_and_counted(lab: Lab, target: str, reason: str) -> None:
    before = drops(lab, 0, reason)
    assert not answers(lab, "client1", target)
    assert drops(lab, 0, reason) - before == 2


def test_a_source_that_is_not_the_containers_own_is_dropped_and_counted(lab: Lab) -> None:
    assert answers(lab, "client2", balanced("v4"))  # the gateway's link address is known: asking for it counts too
    before = forged(lab, "client2")
    run(lab, "client2", "ip", "address", "add", "10.18.0.100/32", "dev", "lo")
    try:
        assert not answers(lab, "client2", "-I", "10.18.0.100", balanced("v4"))
    finally:
        run(lab, "client2", "ip", "address", "del", "10.18.0.100/32", "dev", "lo")
    until(lambda: forged(lab, "client2") - before == 2, "both are counted")


@by_family
def test_no_container_speaks_as_its_neighbour(lab: Lab, family: Family) -> None:
    """Who may send to that neighbour, and what it is told, is judged by the source alone."""
    before, held = forged(lab, "client2"), drops(lab, 1, "spoofed-source")
    neighbour, target = namespace_ip(lab, lab.plan.web[1], family), instance_ip(lab, lab.plan.web[0], family)
    run(lab, "client2", *program("spoofer", "eth0", neighbour, target))
    until(lambda: forged(lab, "client2") - before == 1, "it is counted")
    assert drops(lab, 1, "spoofed-source") == held
    flows = lab.api(lab.plan.nodes[1]).flows()
    assert not [it for it in flows if (it["local"], it["local_port"]) == (neighbour, SPOOFER_PORT)]


@by_family
def test_no_container_speaks_as_its_node(lab: Lab, family: Family) -> None:
    """Workers believe ICMP errors from that address; so nothing that a container sends from it comes as far as them."""
    version = "-4" if family == "v4" else "-6"
    (route,) = json.loads(run(lab, "client2", "ip", version, "-j", "route", "show", "default"))
    gateway = route["gateway"]
    target = instance_ip(lab, lab.plan.web[0], family)
    before, came = forged(lab, "client2"), drops(lab, 1, "spoofed-source")
    run(lab, "client2", *program("spoofer", "eth0", gateway, target))
    run(lab, "client2", *program("spoofer", "eth0", "203.0.113.9" if family == "v4" else "2001:db8:9::9", target))
    until(lambda: forged(lab, "client2") - before == 2, "both are counted")
    assert drops(lab, 1, "spoofed-source") == came


def answers(lab: Lab, member: str, *arguments: str) -> bool:
    """Whether any of two echo requests is answered."""
    command = lab.command(member, ["ping", "-nqc2", "-i0.05", "-W0.3", *arguments])
    return subprocess.run(command, capture_output=True).returncode == 0


def forged(lab: Lab, member: str) -> int:
    """Frames that a container sent from addresses that are not its own."""
    container = next(it for it in lab.plan.containers if it.name == member)
    counted = lab.api(container.node).status()["forged"]
    key = container.service, container.instance
    return sum(int(it["frames"]) for it in counted if (it["service"], it["instance"]) == key)


def drops(lab: Lab, node: int, reason: str) -> int:
    """Packets from containers that a node's workers have dropped for a reason."""
    workers = lab.api(lab.plan.nodes[node]).status()["workers"]
    return sum(it["drops"]["tun"].get(reason, 0) for it in workers)


@by_family
def test_a_client_may_have_the_tunnels_port_as_its_own(lab: Lab, family: Family) -> None:
    """As the kernel gives it to one of 28,000 sockets."""
    target, own = instance_ip(lab, lab.plan.web[1], family), str(Config().tunnel.port)
    command = (sys.executable, "-m", "appliance.lab.probe", target, "--times", "1", "--own-port", own)
    assert {it["protocol"] for it in json.loads(run(lab, "client1", *command))} == {"tcp", "udp"}
