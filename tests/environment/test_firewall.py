"""Rules of ours in a real kernel: what they say, how fast they are there, whom they leave alone."""

import json
import time
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from appliance.environment import firewall, nft
from appliance.environment.errors import EnvironmentError_
from appliance.environment.firewall import NodePort, Rules, Target
from appliance.environment.listeners import Listener, holder, parse
from tests.environment import others
from tests.environment.netns import BRIDGE, TUN, Netns

MakeNetns = Callable[[], Netns]

RULES = Rules(
    table="edge-appliance",
    bridge=BRIDGE,
    tun=TUN,
    tunnel_port=50103,
    overlay=(ip_network("10.16.0.0/12"), ip_network("fc00::/7")),
    subnets=(ip_network("10.18.0.0/26"), ip_network("fc00::/120")),
    ingress=(ip_address("10.18.0.62"), ip_address("fc00::ff")),
)


def target(address: str, port: int = 80) -> Target:
    return Target(ip_address(address), port)


def with_ports(*ports: NodePort, **changes: Any) -> Rules:
    return Rules(**{**{name: getattr(RULES, name) for name in RULES.__dataclass_fields__}, "ports": ports, **changes})


def many(count: int) -> list[NodePort]:
    """As many ports, each of both IP versions."""
    numbers = range(10_000, 10_000 + count)
    return [NodePort("tcp", it, (target(at),)) for it in numbers for at in ("10.18.0.2", "fc00::2")]


def ruleset(namespace: Netns) -> str:
    """Everything that nft knows in a namespace."""
    return namespace.command("nft", "list", "ruleset")


def described(namespace: Netns) -> dict[str, Any]:
    """The same as data."""
    found: dict[str, Any] = json.loads(namespace.command("nft", "-j", "list", "ruleset"))
    return found


def accepts(namespace: Netns) -> None:
    """Adds our rules to others' chains, as the supervisor does."""
    script = firewall.acceptance(described(namespace), RULES)
    namespace.run(lambda: nft.apply(script))


@pytest.mark.root
def test_a_thousand_ports_are_applied_within_a_second_and_looked_up_in_maps(make_netns: MakeNetns) -> None:
    namespace = make_netns()
    script = firewall.script(with_ports(*many(1000)))
    began = time.monotonic()
    namespace.run(lambda: nft.apply(script))
    assert time.monotonic() - began < 1
    began = time.monotonic()
    namespace.run(lambda: nft.apply(firewall.revision(with_ports(*many(1000)))))
    assert time.monotonic() - began < 1
    few = firewall.script(with_ports(*many(1)))
    assert script.count("dnat") == few.count("dnat"), "no rule more for more ports"
    assert len(firewall.mapped(described(namespace), RULES.table)) == 2000


@pytest.mark.root
def test_what_was_mapped_is_read_back(make_netns: MakeNetns) -> None:
    namespace = make_netns()
    ports = [*many(3), NodePort("udp", 53, (target("10.18.0.2", 5353),))]
    shared = NodePort("tcp", 90, (target("10.18.0.2"), target("10.18.0.3")))
    namespace.run(lambda: nft.apply(firewall.script(with_ports(*ports, shared))))
    assert set(firewall.mapped(described(namespace), RULES.table)) == set(ports)


@pytest.mark.root
@pytest.mark.parametrize("name", others.NAMES)
def test_others_rules_are_left_alone_byte_for_byte(make_netns: MakeNetns, name: str) -> None:
    namespace = make_netns()
    others.leave(namespace, name)
    before = ruleset(namespace)
    namespace.run(lambda: nft.apply(firewall.script(with_ports(*many(2)))))
    accepts(namespace)
    table = namespace.command("nft", "list", "ruleset").replace(before, "")
    assert "edge-appliance" in table
    if name != "podman":
        assert 'accept comment "edge-appliance' in ruleset(namespace)
        assert firewall.acceptance(described(namespace), RULES) == "", "once is enough"
    if name in others.SHOWN_BY_IPTABLES:
        assert "incompatible" not in namespace.command("iptables-nft", "-L", "-n")
    namespace.run(lambda: nft.apply(firewall.withdrawal(described(namespace)) + firewall.removal(RULES.table)))
    assert ruleset(namespace) == before


@pytest.mark.root
def test_ports_that_come_and_go_leave_the_rule_set_as_it_was_byte_for_byte(make_netns: MakeNetns) -> None:
    """Our table keeps its place among others', whatever was in it."""
    namespace = make_netns()
    plain = with_ports(ingress=(), uplinks=("up0",))
    namespace.run(lambda: nft.apply(firewall.script(plain)))
    others.leave(namespace, "docker")
    before = ruleset(namespace)
    assert before.index("edge-appliance") < before.index("table ip filter")
    shared = NodePort("udp", 90, (target("10.18.0.2"), target("10.18.0.3")))
    one = NodePort("tcp", 91, (target("10.18.0.2"),), ip_address("192.0.2.1"))
    for ports in ((*many(1000), shared), (one, *many(2)), ()):
        changed = with_ports(*ports)
        namespace.run(lambda it=changed: nft.apply(firewall.revision(it)))  # type: ignore[misc]
        anew = make_netns()
        anew.run(lambda it=changed: nft.apply(firewall.script(it)))  # type: ignore[misc]
        assert namespace.run(lambda: nft.table(RULES.table)) == anew.run(lambda: nft.table(RULES.table))
    namespace.run(lambda: nft.apply(firewall.revision(plain)))
    assert ruleset(namespace) == before


@pytest.mark.root
def test_a_script_that_the_kernel_refuses_changes_nothing(make_netns: MakeNetns) -> None:
    namespace = make_netns()
    namespace.run(lambda: nft.apply(firewall.script(with_ports(*many(2)))))
    before = ruleset(namespace)
    broken = firewall.script(with_ports(NodePort("tcp", 70_000, (target("10.18.0.2"),))))
    with pytest.raises(EnvironmentError_, match="nft: "):
        namespace.run(lambda: nft.apply(broken))
    assert ruleset(namespace) == before


@pytest.mark.root
def test_a_table_that_is_not_there_is_none(make_netns: MakeNetns) -> None:
    namespace = make_netns()
    assert namespace.run(lambda: nft.table("edge-appliance")) is None
    namespace.run(lambda: nft.apply(firewall.removal("edge-appliance")))


TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 010200C0:0050 050200C0:9C40 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 20 0 0 10 -1
"""
TCP6 = """  sl  local_address                         remote_address                        st tx_queue rx_queue
   0: B80D0120000000000000000001000000:01BB 00000000000000000000000000000000:0000 0A 00000000:00000000
"""


def test_listeners_are_those_who_wait_for_anybody() -> None:
    found = [*parse(TCP, "tcp"), *parse(TCP6, "tcp")]
    assert found == [
        Listener("tcp", ip_address("0.0.0.0"), 8080),
        Listener("tcp", ip_address("127.0.0.1"), 53),
        Listener("tcp", ip_address("2001:db8::1"), 443),
    ]
    assert holder("tcp", 8080, None, found) == found[0]
    assert holder("udp", 8080, None, found) is None
    assert holder("tcp", 53, None, found) is None, "the loopback's ports are not taken away"
    assert holder("tcp", 443, ip_address("2001:db8::1"), found) == found[2]
    assert holder("tcp", 443, ip_address("2001:db8::2"), found) is None
