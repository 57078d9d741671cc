"""Two nodes of one lab, and a way to hang containers of other systems on them.

    eaperf-direct2  eaperf-vxlan2  eaperf-client2     eaperf-direct1  eaperf-vxlan1  eaperf-web0
         eth0           eth0           eth0                eth0           eth0          eth0
          │              │              │                   │              │             │        MTU 1450
        br-91          br-92         edge-br0             br-91          br-92        edge-br0
    ┌─────┴──────────────┴──────────────┴─────┐       ┌─────┴──────────────┴─────────────┴──────┐
    │ eaperf-node2    clients          uplink │       │ uplink          servers    eaperf-node1 │
    └─────────────────────────────────────┬───┘       └───┬─────────────────────────────────────┘
                                          │               │                                       MTU 1500
                                       ┌──┴───────────────┴──┐
                                       │ node2  bridge node1 │
                                       └─────────────────────┘ eaperf-underlay

All systems share the two nodes and the underlay, each with a container of its own on either side, joined by
the same veth and bridge. So a sample of one system and the next differ in nothing but the system."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv6Interface

from appliance.lab import lifecycle, network
from appliance.lab.network import UPLINK
from appliance.lab.plan import UNDERLAY_MTU, Node, Setting, Spec, topology
from appliance.lab.processes import inside
from perf import net, offload

INNER_MTU = 1450
"""Of containers and bridges: what VXLAN leaves of the underlay's 1500 bytes. The appliance would leave
1472."""
ETHERNET_HEADER = 14
PORT = "v-"
"""Of the name of a node's end of a container's veth; the appliance names its own."""
FRAME_MAX = UNDERLAY_MTU + ETHERNET_HEADER

PLAN = topology(Spec(name=net.LAB, nodes=2, instances=1))
"""The one instance of the demo service is on node 1, so the client of node 2 is the one to call it."""
SERVER_NODE, CLIENT_NODE = PLAN.nodes
PAIRS = ((CLIENT_NODE, SERVER_NODE), (SERVER_NODE, CLIENT_NODE))
"""Each node with the other one."""


UNTRACKED = """
table inet perf-untracked {
    chain arriving {
        type filter hook prerouting priority raw
        ip saddr { 10.91.0.0/16, 10.92.0.0/16, 10.94.0.0-10.97.255.255 } notrack
        ip6 saddr { 2001:db8:91::/48, 2001:db8:92::/48, 2001:db8:94::-2001:db8:97:ffff:ffff:ffff:ffff:ffff } notrack
        udp dport { 4789, 40000-40999 } notrack
    }
    chain leaving {
        type filter hook output priority raw
        udp dport { 4789, 40000-40999 } notrack
    }
}
"""
"""Rules for nft(8) on both nodes. The appliance's own rules switch the kernel's connection tracking on where it runs;
nobody else shall pay for that. All systems but the one that needs it (`vxlan-vip`) are exempt, their tunnels too."""


@dataclass(frozen=True)
class Subnet:
    """The containers' addresses of one system on one node, derived from the system's number and the
    node's."""

    system: int
    node: int

    @property
    def prefixes(self) -> tuple[str, str]:
        """The subnet in both families."""
        return str(self._v4(0).network), str(self._v6(0).network)

    def host(self, number: int) -> tuple[str, str]:
        """Host `number` in both families, with prefix length; 1 is the gateway."""
        return str(self._v4(number)), str(self._v6(number))

    def _v4(self, host: int) -> IPv4Interface:
        return IPv4Interface(f"10.{self.system}.{self.node}.{host}/24")

    def _v6(self, host: int) -> IPv6Interface:
        return IPv6Interface(f"2001:db8:{self.system}:{self.node}::{host}/64")


def bare(address: str) -> str:
    """An address without its prefix length."""
    return address.partition("/")[0]


@dataclass(frozen=True)
class Path:
    """Where a system's traffic goes in and out (namespaces), and what the client dials to reach the
    server."""

    client: str
    server: str
    address_v4: str
    address_v6: str
    """Empty where the system carries no IPv6."""


def build(settings: Iterable[Setting], report: Callable[[str], None], *, appliance: bool) -> None:
    """The lab's underlay and nodes, with the appliance on them or without. Raises SpecError, LabError,
    ApiError."""
    if appliance:
        lifecycle.up(replace(PLAN.spec, settings=tuple(settings)), report)
    else:
        network.build(PLAN)
    for node in PLAN.nodes:
        net.run(*inside(node.namespace, ["nft", "-f", "-"]), stdin=UNTRACKED)


def join(system: str, number: int, mtu: int = INNER_MTU) -> Path:
    """A client and a server container for a system of this number, and nodes that forward. Raises
    NetError."""
    for node in PLAN.nodes:
        net.sysctl(node.namespace, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    client = add_container(CLIENT_NODE, system, Subnet(number, CLIENT_NODE.number), mtu)
    server = add_container(SERVER_NODE, system, Subnet(number, SERVER_NODE.number), mtu)
    v4, v6 = Subnet(number, SERVER_NODE.number).host(2)
    return Path(client, server, bare(v4), bare(v6))


def add_container(node: Node, system: str, subnet: Subnet, mtu: int = INNER_MTU) -> str:
    """A container on a bridge of its own system on a node; its namespace. Raises NetError."""
    namespace = f"{net.PREFIX}{system}{node.number}"
    net.add_namespace(namespace)
    bridge, port = (
        f"br-{subnet.system}",
        f"{PORT}{subnet.system}",
    )  # the names of systems are longer than a device's may be
    gateways, addresses = subnet.host(1), subnet.host(2)
    net.ip(
        node.namespace,
        f"""
        link add name {bridge} mtu {mtu} up type bridge
        addr add {gateways[0]} dev {bridge}
        addr add {gateways[1]} dev {bridge} nodad
        link add name {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {namespace}
        link set {port} master {bridge} up
        """,
    )
    net.ip(
        namespace,
        f"""
        link set eth0 up
        addr add {addresses[0]} dev eth0
        addr add {addresses[1]} dev eth0 nodad
        route add default via {bare(gateways[0])}
        route add default via {bare(gateways[1])}
        """,
    )
    return namespace


def ports(node: Node) -> list[str]:
    """A node's ends of its containers' veths, of all systems that `add_container` made one for. Raises NetError."""
    links = json.loads(net.run("ip", "-n", node.namespace, "-json", "link", "show", "type", "veth"))
    return [link["ifname"] for link in links if link["ifname"].startswith(PORT)]


@contextmanager
def cutting_underlay() -> Iterator[None]:
    """The underlay as a real wire: every packet on it is cut to its MTU, and nodes merge what they receive
    (GRO).

    Both ends of each link lose segmentation; the switch's own ends do not merge, as no wire does.
    """
    with ExitStack() as stack:
        for node in PLAN.nodes:
            stack.enter_context(offload.switched(node.namespace, UPLINK, segmentation=False, gro=True))
            stack.enter_context(offload.switched(PLAN.underlay, node.name, segmentation=False, gro=False))
        yield


@dataclass(frozen=True)
class Traffic:
    """Frames and bytes that the client's node has sent into the underlay."""

    frames: int
    octets: int

    def __sub__(self, before: "Traffic") -> "Traffic":
        return Traffic(self.frames - before.frames, self.octets - before.octets)

    @property
    def mean_frame(self) -> float:
        """Bytes a frame; a super-packet counts as one."""
        return self.octets / self.frames if self.frames else 0.0


def underlay_traffic() -> Traffic:
    """The counters of the client node's port at the underlay's bridge."""
    argv = ("ip", "-n", PLAN.underlay, "-json", "-stats", "link", "show", "dev", CLIENT_NODE.name)
    (link,) = json.loads(net.run(*argv))
    received = link["stats64"]["rx"]
    return Traffic(received["packets"], received["bytes"])
