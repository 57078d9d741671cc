"""Which ports a node opens for which services, and when an instance is good: decisions."""

import asyncio
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from appliance.cluster.messages import Health, TableQueryResult
from appliance.environment.attachment import Attachment, NetnsRef
from appliance.environment.firewall import NodePort, Target
from appliance.supervisor.health import NOT_PERMITTED, Tally, why_bad
from appliance.supervisor.ingress import Here, needs_ingress, wanted

ONE, TWO = "65f0000000000000000000a1", "65f0000000000000000000b2"
INGRESS = (ip_address("10.18.0.62"), ip_address("fc00::ff"))
RR, RR_V6, CLOSEST = "10.30.30.30", "fdff:2000::30", "10.30.30.31"


def job(*exposed: dict[str, Any], instances: int = 2, **more: Any) -> TableQueryResult:
    """Instances 10.18.0.2 (here) and 10.18.0.66 (elsewhere), one more here with three."""
    addresses = [("10.18.0.2", "fc00::2"), ("10.18.0.66", "fc00::102"), ("10.18.0.3", "fc00::3")][:instances]
    own = [{"IpType": "RR", "Address": RR, "Address_v6": RR_V6}, {"IpType": "closest", "Address": CLOSEST}]
    listed = [
        {
            "instance_number": number,
            "namespace_ip": v4,
            "namespace_ip_v6": v6,
            "host_ip": "192.0.2.1",
            "host_port": 50103,
            "service_ip": [*own, {"IpType": "instance_ip", "Address": f"10.30.0.{number + 1}"}],
            **more.get(f"of_{number}", {}),
        }
        for number, (v4, v6) in enumerate(addresses)
    ]
    rest = {key: value for key, value in more.items() if not key.startswith("of_")}
    body = {"app_name": "app.ns.web.test", "instance_list": listed, "exposed": list(exposed), **rest}
    return TableQueryResult.model_validate(body)


def here(*containers: str, node: str = ONE, ingress: tuple[Any, ...] = INGRESS) -> Here:
    return Here(node, frozenset(map(ip_address, containers)), ingress)


def ports(result: TableQueryResult, at: Here) -> list[str]:
    """Each port as a line."""
    return [spoken(it) for it in wanted([result], at)]


def spoken(port: NodePort) -> str:
    targets = ", ".join(f"{it.address} {it.port}" for it in port.targets)
    where = "" if port.address is None else f"{port.address} "
    return f"{where}{port.port}/{port.protocol} -> {targets}"


CONTAINERS = ("10.18.0.2", "fc00::2", "10.18.0.3", "fc00::3")


@pytest.mark.parametrize(
    ("exposed", "at", "opened"),
    [
        ({"port": 8080, "to": 80}, here(), [f"8080/tcp -> {RR} 80", f"8080/tcp -> {RR_V6} 80"]),
        ({"port": 80, "policy": "closest"}, here(), [f"80/tcp -> {CLOSEST} 80"]),
        ({"port": 80, "policy": "maglev"}, here(), []),
        ({"port": 80}, here(ingress=INGRESS[:1]), [f"80/tcp -> {RR} 80"]),
        ({"port": 80}, here(ingress=()), []),
        ({"port": 80, "protocol": "udp", "address": "2001:db8::7"}, here(), [f"2001:db8::7 80/udp -> {RR_V6} 80"]),
        ({"port": 80, "nodes": [TWO]}, here(), []),
        ({"port": 80, "nodes": [TWO, ONE]}, here(), [f"80/tcp -> {RR} 80", f"80/tcp -> {RR_V6} 80"]),
        ({"port": 80, "nodes": "hosting"}, here(), []),
        ({"port": 80, "nodes": "hosting", "policy": "closest"}, here(*CONTAINERS), [f"80/tcp -> {CLOSEST} 80"]),
        (
            {"port": 80, "prefer": "local"},
            here(*CONTAINERS, ingress=()),
            ["80/tcp -> 10.18.0.2 80", "80/tcp -> fc00::2 80"],
        ),
        ({"port": 80, "prefer": "local"}, here(), [f"80/tcp -> {RR} 80", f"80/tcp -> {RR_V6} 80"]),
    ],
)
def test_where_a_port_leads(exposed: dict[str, Any], at: Here, opened: list[str]) -> None:
    assert ports(job(exposed), at) == opened


def test_instances_of_the_node_share_a_port_unless_they_leave() -> None:
    exposed = {"port": 80, "prefer": "local", "address": "192.0.2.1"}
    shared = "192.0.2.1 80/tcp -> 10.18.0.2 80, 10.18.0.3 80"
    assert ports(job(exposed, instances=3), here(*CONTAINERS)) == [shared]
    for leaves in ({"state": "draining"}, {"state": "down"}, {"weight": 0}):
        left = job(exposed, instances=3, of_0=leaves)
        assert ports(left, here(*CONTAINERS)) == ["192.0.2.1 80/tcp -> 10.18.0.3 80"]


def test_a_service_without_an_instance_has_its_port() -> None:
    """It answers that nobody is there, and not that nothing is."""
    addresses = [{"IpType": "RR", "Address": RR}]
    empty = job({"port": 80}, instances=0, service_ips=addresses, default_policy="rr")
    assert wanted([empty], here()) == [NodePort("tcp", 80, (Target(ip_address(RR), 80),))]


def test_the_overlay_is_needed_only_by_ports_that_lead_there() -> None:
    local = job({"port": 80, "prefer": "local"})
    assert not needs_ingress([local], here(*CONTAINERS))
    assert needs_ingress([local], here())
    assert not needs_ingress([job({"port": 80, "nodes": [TWO]})], here())
    assert not needs_ingress([job()], here())


def verdicts(tally: Tally, checks: str) -> list[bool | None]:
    """The verdict after each check; + is a good one."""
    found = []
    for it in checks:
        tally.count(is_good=it == "+")
        found.append(tally.verdict)
    return found


@pytest.mark.parametrize(
    ("rise", "fall", "checks", "seen"),
    [
        (1, 3, "+", "+"),
        (2, 3, "+-++", "???+"),
        (1, 3, "+--+---", "++++++-"),
        (1, 1, "-+-", "-+-"),
        (2, 2, "--++", "?--+"),
    ],
)
def test_checks_in_a_row_make_a_verdict(rise: int, fall: int, checks: str, seen: str) -> None:
    meant = {"+": True, "-": False, "?": None}
    assert verdicts(Tally(rise, fall), checks) == [meant[it] for it in seen]


def test_only_a_change_is_told() -> None:
    tally = Tally(1, 2)
    assert [tally.count(is_good=it) for it in (True, True, False, False, False, True)] == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]


def test_a_command_is_not_run_where_the_node_does_not_permit_it(tmp_path: Path) -> None:
    here = Attachment("a.b.c.d", 0, "eth0", None, None, None, None, NetnsRef.by_path("/proc/self/ns/net"))
    ran = tmp_path / "ran"
    health = Health(command=("touch", str(ran)))
    assert asyncio.run(why_bad(here, health, commands=False)) == NOT_PERMITTED
    assert not ran.exists()
