"""Plans as lists: what is wanted against what is there. No kernel."""

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from itertools import product
from typing import Any

import pytest

from appliance import limits
from appliance.environment import EnvironmentError_, guard, names, plan
from appliance.environment.plan import (
    AddAddress,
    AddRoute,
    AttachmentActual,
    AttachmentWanted,
    AwaitCarrier,
    Command,
    CreateBridge,
    CreateVeth,
    DeleteLink,
    EnableGro,
    Guard,
    Link,
    NodeActual,
    NodeWanted,
    Place,
    RemoveAddress,
    RemoveRoute,
    SetMaster,
    SetMtu,
    SetRecord,
    SetSysctl,
    SetTxQueueLength,
    SetUp,
)

NODE, CONTAINER = Place.NODE, Place.CONTAINER

WANTED = NodeWanted(
    bridge="br",
    tun="tun",
    mtu=1450,
    txqueuelen=1000,
    gateways=(ip_interface("10.18.0.1/26"), ip_interface("fc00::1/120")),
    overlay=(ip_network("10.16.0.0/12"), ip_network("fc00::/7")),
)
FRESH_TUN = Link("tun", 7, kind="tun", mtu=1500, txqueuelen=500)
FRESH = NodeActual(ipv6=True, tun=FRESH_TUN, sysctls={"net/ipv4/ip_forward": "0"})
RECORD = "edge1 web 0 eth0 10.18.0.2 fc00::2 name:web"
VETH = names.veth_name("web", 0)
WHOLE_VETH = Link(
    VETH, 12, kind="veth", up=True, carrier=True, mtu=1450, master=9, group=plan.LINK_GROUP, alias=RECORD, peer=3
)
OWN = (ip_address("10.18.0.2"), ip_address("fc00::2"))
WHOLE_BRIDGE = Link("br", 9, kind="bridge", up=True, mtu=1450, group=plan.LINK_GROUP)
WHOLE = NodeActual(
    ipv6=True,
    bridge=WHOLE_BRIDGE,
    tun=replace(FRESH_TUN, up=True, mtu=1450, txqueuelen=1000),
    gateways=frozenset(WANTED.gateways),
    tun_addresses=frozenset(WANTED.tun_addresses),
    overlay=frozenset(WANTED.overlay),
    veths=(WHOLE_VETH,),
    guards={VETH: guard.name(OWN)},
    sysctls={
        "net/ipv4/ip_forward": "1",
        "net/ipv6/conf/all/forwarding": "1",
        "net/ipv6/conf/br/disable_ipv6": "0",
        "net/ipv6/conf/br/accept_dad": "0",
        "net/ipv6/conf/br/accept_ra": "0",
        "net/ipv4/conf/tun/rp_filter": "2",
        "net/ipv4/conf/tun/accept_local": "1",
        "net/ipv6/conf/tun/disable_ipv6": "0",
        "net/ipv6/conf/tun/addr_gen_mode": "1",
        "net/ipv6/conf/tun/accept_ra": "0",
    },
)


def sysctl(path: str, value: str, place: Place = NODE) -> SetSysctl:
    """A command that sets a value below net/."""
    return SetSysctl(place, f"net/{path}", value)


# --- The node -----------------------------------------------------------------------------------


def test_a_node_from_nothing() -> None:
    assert plan.plan_node(WANTED, FRESH) == [
        sysctl("ipv4/ip_forward", "1"),
        sysctl("ipv6/conf/all/forwarding", "1"),
        CreateBridge("br", names.bridge_mac("br")),
        sysctl("ipv6/conf/br/disable_ipv6", "0"),
        sysctl("ipv6/conf/br/accept_dad", "0"),
        sysctl("ipv6/conf/br/accept_ra", "0"),
        SetMtu(NODE, "br", 1450),
        SetUp(NODE, "br"),
        AddAddress(NODE, "br", ip_interface("10.18.0.1/26")),
        AddAddress(NODE, "br", ip_interface("fc00::1/120")),
        sysctl("ipv4/conf/tun/rp_filter", "2"),
        sysctl("ipv4/conf/tun/accept_local", "1"),
        sysctl("ipv6/conf/tun/disable_ipv6", "0"),
        sysctl("ipv6/conf/tun/addr_gen_mode", "1"),
        sysctl("ipv6/conf/tun/accept_ra", "0"),
        SetMtu(NODE, "tun", 1450),
        SetTxQueueLength("tun", 1000),
        SetUp(NODE, "tun"),
        AddAddress(NODE, "tun", ip_interface("10.18.0.1/32")),
        AddRoute(NODE, "tun", ip_network("10.16.0.0/12")),
        AddRoute(NODE, "tun", ip_network("fc00::/7")),
    ]


def test_a_node_as_wanted_needs_nothing() -> None:
    assert plan.plan_node(WANTED, WHOLE) == []


def test_a_kernel_without_ipv6_gets_no_ipv6() -> None:
    wanted = replace(WANTED, gateways=WANTED.gateways[:1])
    commands = plan.plan_node(wanted, replace(FRESH, ipv6=False))
    assert not [it for it in commands if "ipv6" in plan.describe(it) or "::" in plan.describe(it)]


def test_links_that_take_router_advertisements_do_so_on() -> None:
    commands = plan.plan_node(WANTED, replace(FRESH, advertised=("wan0", "wwan0")))
    ahead = [sysctl(f"ipv6/conf/{link}/accept_ra", "2") for link in ("wan0", "wwan0")]
    assert commands[:2] == ahead
    assert commands.index(sysctl("ipv6/conf/all/forwarding", "1")) == 3


def test_a_router_already_is_left_as_it_is() -> None:
    assert plan.plan_node(WANTED, replace(WHOLE, advertised=("wan0",))) == []


@pytest.mark.parametrize(
    ("actual", "commands"),
    [
        (
            replace(WHOLE, gateways=frozenset([ip_interface("10.18.9.1/26"), *WANTED.gateways])),
            [RemoveAddress("br", ip_interface("10.18.9.1/26"))],
        ),
        (
            replace(
                WHOLE,
                bridge=replace(WHOLE_BRIDGE, group=0),
                gateways=frozenset([ip_interface("192.0.2.1/24"), *WANTED.gateways]),
            ),
            [],
        ),
        (
            replace(WHOLE, overlay=frozenset([ip_network("10.64.0.0/12"), *WANTED.overlay])),
            [RemoveRoute("tun", ip_network("10.64.0.0/12"))],
        ),
        (replace(WHOLE, veths=(replace(WHOLE_VETH, master=0),)), [SetMaster(VETH, "br")]),
        (replace(WHOLE, veths=(replace(WHOLE_VETH, mtu=1500),)), [SetMtu(NODE, VETH, 1450)]),
        (replace(WHOLE, veths=(replace(WHOLE_VETH, up=False),)), [SetUp(NODE, VETH)]),
        (replace(WHOLE, guards={}), [Guard(VETH, OWN)]),
        (replace(WHOLE, guards={VETH: guard.name(OWN[:1])}), [Guard(VETH, OWN)]),
        (replace(WHOLE, veths=(replace(WHOLE_VETH, alias="", up=False, master=0),)), []),
    ],
    ids=[
        "another address on our bridge",
        "another address on another's bridge",
        "a route of ours that is not wanted",
        "a container that is off the bridge",
        "a container with another MTU",
        "a container that is down",
        "a container without a guard",
        "a container with another one's guard",
        "a half-made link is not repaired",
    ],
)
def test_drift(actual: NodeActual, commands: list[Command]) -> None:
    assert plan.plan_node(WANTED, actual) == commands


def test_a_bridge_that_was_deleted_gets_its_ports_again() -> None:
    commands = plan.plan_node(WANTED, replace(WHOLE, bridge=None, gateways=frozenset()))
    assert commands.index(CreateBridge("br", names.bridge_mac("br"))) < commands.index(SetMaster(VETH, "br"))


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (replace(WHOLE, tun=None), r"network\.tun: expected the TUN link tun, got none"),
        (replace(WHOLE, tun=Link("tun", 7)), r"network\.tun: .*, got a physical link"),
        (replace(WHOLE, bridge=Link("br", 9, kind="veth")), r"network\.bridge: .* got a veth link"),
        (replace(WHOLE, ipv6=False), r"network\.subnet_v6: expected a kernel with IPv6"),
    ],
)
def test_what_no_command_helps_against(actual: NodeActual, message: str) -> None:
    with pytest.raises(EnvironmentError_, match=message):
        plan.plan_node(WANTED, actual)


def test_removal_takes_away_what_is_ours() -> None:
    half_made = Link("ea0123456789", 13, kind="veth", group=plan.LINK_GROUP)
    assert plan.plan_removal(WANTED, replace(WHOLE, veths=(WHOLE_VETH, half_made))) == [
        DeleteLink(VETH),
        DeleteLink("ea0123456789"),
        DeleteLink("br"),
        RemoveRoute("tun", ip_network("10.16.0.0/12")),
        RemoveRoute("tun", ip_network("fc00::/7")),
        RemoveAddress("tun", ip_interface("10.18.0.1/32")),
    ]


def test_removal_of_nothing() -> None:
    assert plan.plan_removal(WANTED, FRESH) == []


def test_removal_leaves_a_bridge_that_was_there_before() -> None:
    there = replace(WHOLE, bridge=replace(WHOLE_BRIDGE, group=0), veths=())
    commands = plan.plan_removal(WANTED, there)
    assert commands[:2] == [RemoveAddress("br", it) for it in WANTED.gateways]
    assert DeleteLink("br") not in commands


# --- A container --------------------------------------------------------------------------------

PLACED = AttachmentWanted(
    veth=VETH,
    bridge="br",
    interface="eth0",
    mac="02:ea:0a:12:00:02",
    mtu=1450,
    addresses=(ip_interface("10.18.0.2/26"), ip_interface("fc00::2/120")),
    gateways=(ip_address("10.18.0.1"), ip_address("fc00::1")),
    overlay=WANTED.overlay,
    record=RECORD,
)
EMPTY = AttachmentActual(ipv6=True, bridge=WHOLE_BRIDGE, names=frozenset({"lo"}))
ATTACHED = AttachmentActual(
    ipv6=True,
    bridge=WHOLE_BRIDGE,
    veth=WHOLE_VETH,
    gro=True,
    guard=guard.name(OWN),
    peer=Link("eth0", 3, kind="veth", up=True, mtu=1450, peer=12),
    names=frozenset({"lo", "eth0"}),
    loopback_up=True,
    addresses=frozenset(PLACED.addresses),
    routes=frozenset({ip_network("0.0.0.0/0"), ip_network("::/0")}),
    sysctls={
        (NODE, f"net/ipv6/conf/{VETH}/disable_ipv6"): "1",
        (CONTAINER, "net/ipv6/conf/eth0/disable_ipv6"): "0",
        (CONTAINER, "net/ipv6/conf/eth0/accept_dad"): "0",
        (CONTAINER, "net/ipv6/conf/eth0/accept_ra"): "0",
    },
)
FROM_NOTHING: list[Command] = [
    CreateVeth(VETH, "br", "eth0", "02:ea:0a:12:00:02", 1450),
    sysctl(f"ipv6/conf/{VETH}/disable_ipv6", "1"),
    sysctl("ipv6/conf/eth0/disable_ipv6", "0", CONTAINER),
    sysctl("ipv6/conf/eth0/accept_dad", "0", CONTAINER),
    sysctl("ipv6/conf/eth0/accept_ra", "0", CONTAINER),
    EnableGro(VETH),
    Guard(VETH, OWN),
    SetUp(NODE, VETH),
    SetUp(CONTAINER, "lo"),
    SetUp(CONTAINER, "eth0"),
    AddAddress(CONTAINER, "eth0", ip_interface("10.18.0.2/26")),
    AddAddress(CONTAINER, "eth0", ip_interface("fc00::2/120")),
    AddRoute(CONTAINER, "eth0", ip_network("0.0.0.0/0"), ip_address("10.18.0.1")),
    AddRoute(CONTAINER, "eth0", ip_network("::/0"), ip_address("fc00::1")),
    AwaitCarrier(NODE, VETH),
    AwaitCarrier(CONTAINER, "eth0"),
    SetRecord(VETH, RECORD),
]


def test_a_container_from_nothing() -> None:
    assert plan.plan_attachment(PLACED, EMPTY) == FROM_NOTHING


def test_a_container_as_wanted_needs_nothing() -> None:
    assert plan.plan_attachment(PLACED, ATTACHED) == []


@pytest.mark.parametrize("link", [WHOLE_VETH, replace(WHOLE_VETH, alias="")])
def test_a_link_that_leads_elsewhere_is_made_anew(link: Link) -> None:
    actual = replace(EMPTY, veth=link, gro=True)
    assert plan.plan_attachment(PLACED, actual) == [DeleteLink(VETH), *FROM_NOTHING]


def test_the_record_is_always_the_last_command() -> None:
    """Whatever is there of it, a plan that sets the record does so when all else is done."""
    choices: dict[str, tuple[Any, ...]] = {
        "veth": (None, WHOLE_VETH, replace(WHOLE_VETH, alias="", up=False, mtu=9000)),
        "peer": (None, ATTACHED.peer),
        "gro": (False, True),
        "guard": ("", ATTACHED.guard),
        "loopback_up": (False, True),
        "addresses": (frozenset(), ATTACHED.addresses),
        "routes": (frozenset(), ATTACHED.routes),
        "sysctls": ({}, ATTACHED.sysctls),
    }
    for values in product(*choices.values()):
        actual = replace(ATTACHED, **dict(zip(choices, values, strict=True)))
        commands = plan.plan_attachment(PLACED, actual)
        assert not [it for it in commands[:-1] if isinstance(it, SetRecord)]
        if actual.veth is None or actual.peer is None or actual.veth.record is None:
            assert commands[-1] == SetRecord(VETH, RECORD)


def test_a_family_with_another_way_out_gets_only_the_overlay() -> None:
    commands = plan.plan_attachment(PLACED, replace(EMPTY, defaults=frozenset({6})))
    assert [it for it in commands if isinstance(it, AddRoute)] == [
        AddRoute(CONTAINER, "eth0", ip_network("0.0.0.0/0"), ip_address("10.18.0.1")),
        AddRoute(CONTAINER, "eth0", ip_network("fc00::/7"), ip_address("fc00::1")),
    ]


def test_ipv4_alone_touches_no_ipv6_inside() -> None:
    wanted = replace(PLACED, addresses=PLACED.addresses[:1], gateways=PLACED.gateways[:1])
    commands = plan.plan_attachment(wanted, EMPTY)
    assert [it for it in commands if isinstance(it, SetSysctl)] == [sysctl(f"ipv6/conf/{VETH}/disable_ipv6", "1")]
    without = plan.plan_attachment(wanted, replace(EMPTY, ipv6=False))
    assert not [it for it in without if isinstance(it, SetSysctl)]


def test_a_link_that_docker_moves_is_made_to_the_nodes_end() -> None:
    offered = replace(PLACED, interface="eo0123456789")
    commands = plan.plan_offer(offered, EMPTY)
    assert commands[0] == CreateVeth(VETH, "br", "eo0123456789", PLACED.mac, PLACED.mtu)
    assert commands[-1] == SetRecord(VETH, RECORD)
    assert not [it for it in commands if getattr(it, "place", NODE) is CONTAINER], "that is Docker's"
    assert plan.plan_offer(offered, ATTACHED) == [DeleteLink(VETH), *commands]
    without = plan.plan_offer(offered, replace(EMPTY, ipv6=False))
    assert not [it for it in without if isinstance(it, SetSysctl)]
    with pytest.raises(EnvironmentError_, match=r"network\.bridge: expected the bridge br, got none"):
        plan.plan_offer(offered, replace(EMPTY, bridge=None))


def test_without_a_bridge() -> None:
    with pytest.raises(EnvironmentError_, match=r"network\.bridge: expected the bridge br, got none"):
        plan.plan_attachment(PLACED, replace(EMPTY, bridge=None))


def test_a_command_in_words() -> None:
    assert plan.describe(FROM_NOTHING[0]) == (
        f"CreateVeth link={VETH} bridge=br peer=eth0 mac=02:ea:0a:12:00:02 mtu=1450"
    )
    assert plan.describe(FROM_NOTHING[-4]) == ("AddRoute place=container link=eth0 destination=::/0 gateway=fc00::1")


@pytest.mark.parametrize("mtu", [1280, 1450, 1500, 8950])
@pytest.mark.parametrize("headers", [40, 52, 60, 72])
def test_a_super_packet_fits_one_train(mtu: int, headers: int) -> None:
    """As tcp_xmit_size_goal reckons: gso_max_size less the headers' room, in whole segments."""
    segments = (plan.super_packet_max(mtu) - 321) // (mtu - headers)
    assert segments * mtu <= limits.GSO_BYTES_MAX
    assert (segments + 2) * mtu > limits.GSO_BYTES_MAX or segments >= limits.UDP_SEGMENTS_MAX - 1
