"""What a lab consists of: names, addresses, services and configuration, from a `Spec`. Pure.

Address plan (the same ranges as a cluster hands out, so that packets look the same in both):

    underlay of node k      198.18.0.0/15 + k, 2001:db8::/64 + k (RFC 2544, RFC 3849: never routed outside)
    containers of node k    the k-th subnet from 10.18.0.0 (/26 or larger) and from fc00:: (/120 or larger)
    ServiceIP of the demo   10.30.30.30 and fdff:2000::30
    instance IPs            10.30.0.1, 10.30.0.2 … and fdff::1, fdff::2 …

Web instance i runs on node 1 + i mod nodes; each node has one client.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from appliance.config import Config, dotted

Family = Literal["v4", "v6"]

DEFAULT_NAME = "lab"
NAME = re.compile(r"[a-z][a-z0-9]{0,11}")
"""A lab's name has no dash, so that no lab's namespaces begin like another's."""
NODES_MAX = 1000
"""A bridge of the kernel has 1,023 ports (BR_MAX_PORTS, net/bridge/br_private.h)."""
INSTANCES_MAX = 5000
"""With the clients of NODES_MAX nodes, the instance IPs end before WEB_V4, the 7,650th address."""

NAMESPACES = Path("/run/netns")
UNDERLAY_V4, UNDERLAY_V6 = IPv4Network("198.18.0.0/15"), IPv6Network("2001:db8::/64")
UNDERLAY_MTU = 1500
CONTAINERS_V4, CONTAINERS_V6 = IPv4Network("10.18.0.0/15"), IPv6Network("fc00::/64")
SUBNET_V4_LONGEST, SUBNET_V6_LONGEST = 26, 120
INSTANCES_V4, INSTANCES_V6 = IPv4Address("10.30.0.0"), IPv6Address("fdff::")

WEB_SERVICE, CLIENT_SERVICE = "demo.lab.web.lab", "demo.lab.client.lab"
WEB_V4, WEB_V6 = IPv4Address("10.30.30.30"), IPv6Address("fdff:2000::30")
WEB_PORT = 80
IPERF_PORTS = (5201, 5202, 5203, 5204)
"""iperf3 serves one test at a time: one server a port."""


class SpecError(Exception):
    """A lab that cannot be; `str()` is a sentence that names the option and what was expected."""


@dataclass(frozen=True)
class Setting:
    """One key of the nodes' configuration that the user chose."""

    section: str
    key: str
    value: Any


@dataclass(frozen=True)
class Spec:
    """What the user asks for. Raises SpecError where that cannot be built."""

    name: str = DEFAULT_NAME
    nodes: int = 2
    instances: int = 2
    tunnel: Family = "v4"
    """Family of the underlay addresses that the nodes' tunnels use."""
    workers: tuple[int, ...] = (0,)
    """Workers of node 1, 2 …, the last number for all further nodes; 0: as many as the default gives."""
    cut: bool = False
    """The underlay cuts super-packets as a network card without segmentation offload would."""
    settings: tuple[Setting, ...] = ()

    def __post_init__(self) -> None:
        _expect_name(self.name)
        _expect_range("nodes", self.nodes, 1, NODES_MAX)
        _expect_range("instances", self.instances, 1, INSTANCES_MAX)
        if not self.workers:
            raise SpecError("workers: expected at least one number")


def _expect_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise SpecError(f"name: expected a letter and up to 11 lower-case letters or digits, got {name!r}")


def _expect_range(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise SpecError(f"{option}: expected {low} to {high}, got {value}")


def setting(text: str) -> Setting:
    """`section.key=value` with a TOML value; what is no TOML is a string. Raises SpecError."""
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text)
    if match is None:
        raise SpecError(f"set: expected section.key=value, got {text!r}")
    section, key, value = match.groups()
    try:
        return Setting(section, key, tomllib.loads(f"value = {value}")["value"])
    except tomllib.TOMLDecodeError:
        return Setting(section, key, value)


@dataclass(frozen=True)
class Node:
    """A node: `number` counts from 1."""

    number: int
    namespace: str
    underlay_v4: IPv4Address
    underlay_v6: IPv6Address
    subnet_v4: IPv4Network
    subnet_v6: IPv6Network

    @property
    def name(self) -> str:
        """Also the name of its port at the underlay's bridge."""
        return f"node{self.number}"


@dataclass(frozen=True)
class Container:
    """A namespace that a node attaches as an instance of a service."""

    name: str
    namespace: str
    node: Node
    service: str
    instance: int
    instance_v4: IPv4Address
    instance_v6: IPv6Address


@dataclass(frozen=True)
class Service:
    """A service with its balanced ServiceIP, if it has one."""

    name: str
    balanced: tuple[IPv4Address, IPv6Address] | None


Member = Node | Container
"""What has a namespace and a directory."""


@dataclass(frozen=True)
class Topology:
    """Everything in a lab, in the order in which it is built."""

    spec: Spec
    underlay: str
    nodes: tuple[Node, ...]
    containers: tuple[Container, ...]
    services: tuple[Service, ...]

    @property
    def namespaces(self) -> tuple[str, ...]:
        """All of them: the underlay's, the nodes', the containers'."""
        return (self.underlay, *(it.namespace for it in self.members))

    @property
    def members(self) -> tuple[Member, ...]:
        """The nodes, then the containers."""
        return (*self.nodes, *self.containers)

    @property
    def web(self) -> tuple[Container, ...]:
        """The instances of the demo service."""
        return tuple(it for it in self.containers if it.service == WEB_SERVICE)

    def client(self, node: int = 1) -> Container:
        """The client of a node, by the node's number."""
        return next(it for it in self.containers if it.service == CLIENT_SERVICE and it.node.number == node)

    def tunnel_address(self, node: Node) -> IPv4Address | IPv6Address:
        """The underlay address that the other nodes send to."""
        return node.underlay_v4 if self.spec.tunnel == "v4" else node.underlay_v6


def topology(spec: Spec) -> Topology:
    """The lab that a spec asks for."""
    nodes = tuple(_nodes(spec))
    return Topology(
        spec=spec,
        underlay=f"{spec.name}-underlay",
        nodes=nodes,
        containers=tuple(_containers(spec, nodes)),
        services=(Service(WEB_SERVICE, (WEB_V4, WEB_V6)), Service(CLIENT_SERVICE, None)),
    )


def namespace_path(namespace: str) -> Path:
    """The file that a named namespace is bound to (ip-netns(8))."""
    return NAMESPACES / namespace


def owned(lab: str, namespace: str) -> bool:
    """Whether a namespace's name is one that this lab gives."""
    return re.fullmatch(rf"{re.escape(lab)}-(underlay|(node|client|web)[0-9]+)", namespace) is not None


def _nodes(spec: Spec) -> Iterator[Node]:
    reserved = 3  # network, gateway and broadcast address
    containers = 1 + -(-spec.instances // spec.nodes)
    bits = (containers + reserved - 1).bit_length()
    subnets_v4 = CONTAINERS_V4.subnets(new_prefix=min(SUBNET_V4_LONGEST, 32 - bits))
    subnets_v6 = CONTAINERS_V6.subnets(new_prefix=min(SUBNET_V6_LONGEST, 128 - bits))
    for number, v4, v6 in zip(range(1, spec.nodes + 1), subnets_v4, subnets_v6, strict=False):
        yield Node(number, f"{spec.name}-node{number}", UNDERLAY_V4[number], UNDERLAY_V6[number], v4, v6)


def _containers(spec: Spec, nodes: tuple[Node, ...]) -> Iterator[Container]:
    members = [(f"web{i}", nodes[i % len(nodes)], WEB_SERVICE, i) for i in range(spec.instances)]
    members += [(f"client{node.number}", node, CLIENT_SERVICE, node.number - 1) for node in nodes]
    for index, (name, node, service, instance) in enumerate(members, start=1):
        v4, v6 = _instance_v4(index), INSTANCES_V6 + index
        yield Container(name, f"{spec.name}-{name}", node, service, instance, v4, v6)


def _instance_v4(index: int) -> IPv4Address:
    """The instance address of an index; as in a cluster, no octet is 254 or 255."""
    high, low = divmod(index, 254)
    return INSTANCES_V4 + (high << 8) + low


@dataclass(frozen=True)
class Attached:
    """What a node's API answered for a container; a family without a subnet has no address."""

    container: str
    address_v4: str | None
    address_v6: str | None


def table(plan: Topology, attached: Iterable[Attached], port: int) -> list[dict[str, Any]]:
    """The lab's services as a list of table-query results: what every node must know.

    `port` is the UDP port that each node receives the overlay on.
    """
    addresses = {it.container: it for it in attached}
    return [
        {
            "app_name": service.name,
            "instance_list": [
                _entry(plan, service, container, addresses[container.name], port)
                for container in plan.containers
                if container.service == service.name and container.name in addresses
            ],
            "query_key": "",
        }
        for service in plan.services
    ]


def _entry(plan: Topology, service: Service, container: Container, attached: Attached, port: int) -> dict[str, Any]:
    return {
        "instance_number": container.instance,
        "namespace_ip": attached.address_v4,
        "namespace_ip_v6": attached.address_v6,
        "host_ip": str(plan.tunnel_address(container.node)),
        "host_port": port,
        "service_ip": [
            *([] if service.balanced is None else [_service_ip("RR", *service.balanced)]),
            _service_ip("instance_ip", container.instance_v4, container.instance_v6),
        ],
    }


def _service_ip(policy: str, v4: IPv4Address, v6: IPv6Address) -> dict[str, str]:
    return {"IpType": policy, "Address": str(v4), "Address_v6": str(v6)}


def node_config(plan: Topology, node: Node, directory: Path) -> Config:
    """The configuration of a node whose files are in `directory`. Raises SpecError for a wrong setting."""
    raw: dict[str, dict[str, Any]] = {
        "node": {"address": str(plan.tunnel_address(node))},
        "network": {"subnet_v4": str(node.subnet_v4), "subnet_v6": str(node.subnet_v6)},
        "workers": {"count": plan.spec.workers[min(node.number, len(plan.spec.workers)) - 1]},
        "tables": {"static": str(directory / "tables.json")},
        "api": {"socket": str(directory / "api.sock")},
        "paths": {"runtime": str(directory / "run"), "state": str(directory / "state")},
    }
    for it in plan.spec.settings:
        raw.setdefault(it.section, {})[it.key] = it.value
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"set: {dotted(first['loc'])}: {first['msg']}, got {first['input']!r}") from None
