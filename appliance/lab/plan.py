"""What a lab consists of: names, the underlay's addresses, services and configuration, from a `Spec`. Pure.

Address plan:

    underlay of node k      198.18.0.0/15 + k, 2001:db8::/64 + k (RFC 2544, RFC 3849: never routed outside)
    underlay of the cluster 198.19.255.254, 2001:db8::ffff:1
    ServiceIPs of the demo  rr 10.30.30.30 and fdff:2000::30, closest 10.30.30.31 and fdff:1000::30, by its descriptor

All other addresses come from the lab's cluster, and only the cluster knows them: the nodes' subnets, the containers'
addresses in them, the instance IPs.

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

from appliance.cluster.manager.descriptor import Descriptor
from appliance.config import Config, dotted
from appliance.naming import names

Family = Literal["v4", "v6"]

DEFAULT_NAME = "lab"
NAME = re.compile(r"[a-z][a-z0-9]{0,11}")
"""A lab's name has no dash, so that no lab's namespaces begin like another's."""
NODES_MAX = 1000
"""A bridge of the kernel has 1,023 ports (BR_MAX_PORTS, net/bridge/br_private.h)."""
INSTANCES_MAX = 5000
"""With the clients of NODES_MAX nodes, the instance IPs end before WEB_V4, the 7,650th address that is given."""
ROLES = {"web": "demo.lab.web.lab", "client": "demo.lab.client.lab"}
"""What containers are for, which begins their names, and the service that they are instances of."""

NAMESPACES = Path("/run/netns")
UNDERLAY_V4, UNDERLAY_V6 = IPv4Network("198.18.0.0/15"), IPv6Network("2001:db8::/64")
UNDERLAY_MTU = 1500
UNDERLAY_MTU_MIN, UNDERLAY_MTU_MAX = 1280, 9000
"""IPv6 needs the one (RFC 8200, section 5), common switches do not carry more than the other."""
CLUSTER_V4, CLUSTER_V6 = UNDERLAY_V4[-2], UNDERLAY_V6[0xFFFF0001]
MQTT_PORT, REST_PORT = 10003, 10110
SUBNET_V4_LONGEST, SUBNET_V6_LONGEST = 26, 120
"""What a cluster gives a node; larger subnets where a node has more containers."""

WEB_SERVICE, CLIENT_SERVICE = ROLES["web"], ROLES["client"]
WEB_V4, WEB_V6 = IPv4Address("10.30.30.30"), IPv6Address("fdff:2000::30")
CLOSEST_V4, CLOSEST_V6 = IPv4Address("10.30.30.31"), IPv6Address("fdff:1000::30")
WEB_PORT = 80
IPERF_PORTS = (5201, 5202, 5203, 5204)
"""iperf3 serves one test at a time: one server a port."""
WEB: dict[str, Any] = {
    "service_ips": {
        "rr": {"v4": str(WEB_V4), "v6": str(WEB_V6)},
        "closest": {"v4": str(CLOSEST_V4), "v6": str(CLOSEST_V6)},
    },
    "default_policy": "rr",
    "ports": [{"name": "http", "port": WEB_PORT}],
    "metadata": {"about": "demo of the lab"},
}
"""What the demo's descriptor says besides names and size."""


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
    mtu: int = UNDERLAY_MTU
    """Of the underlay and the nodes' uplinks, bytes."""

    def __post_init__(self) -> None:
        _expect_name(self.name)
        _expect_range("nodes", self.nodes, 1, NODES_MAX)
        _expect_range("instances", self.instances, 1, INSTANCES_MAX)
        _expect_range("mtu", self.mtu, UNDERLAY_MTU_MIN, UNDERLAY_MTU_MAX)
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
class Host:
    """A namespace on the underlay. Its name is also that of its port at the underlay's bridge."""

    name: str
    namespace: str
    underlay_v4: IPv4Address
    underlay_v6: IPv6Address


@dataclass(frozen=True)
class Node(Host):
    """A node: `number` counts from 1."""

    number: int

    @property
    def id(self) -> str:
        """By which the cluster knows it: 24 hexadecimal digits, as existing clusters have."""
        return f"1ab{self.number:021x}"


@dataclass(frozen=True)
class Container:
    """A namespace that a node attaches as an instance of a service."""

    name: str
    namespace: str
    node: Node
    service: str
    instance: int


Member = Host | Container
"""What has a namespace and a directory."""


@dataclass(frozen=True)
class Topology:
    """Everything in a lab, in the order in which it is built."""

    spec: Spec
    underlay: str
    cluster: Host
    nodes: tuple[Node, ...]
    containers: tuple[Container, ...]

    @property
    def namespaces(self) -> tuple[str, ...]:
        """All of them: the underlay's, the hosts', the containers'."""
        return (self.underlay, *(it.namespace for it in self.members))

    @property
    def members(self) -> tuple[Member, ...]:
        """The hosts, then the containers."""
        return (*self.hosts, *self.containers)

    @property
    def hosts(self) -> tuple[Host, ...]:
        """Who is on the underlay: the cluster, then the nodes."""
        return (self.cluster, *self.nodes)

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
        cluster=Host("cluster", f"{spec.name}-cluster", CLUSTER_V4, CLUSTER_V6),
        nodes=nodes,
        containers=tuple(_containers(spec, nodes)),
    )


def namespace_path(namespace: str) -> Path:
    """The file that a named namespace is bound to (ip-netns(8))."""
    return NAMESPACES / namespace


def owned(lab: str, namespace: str) -> bool:
    """Whether a namespace's name is one that this lab gives."""
    return re.fullmatch(rf"{re.escape(lab)}-(underlay|cluster|(node|client|web)[0-9]+)", namespace) is not None


def prefixes(spec: Spec) -> tuple[int, int]:
    """Lengths of the IPv4 and IPv6 prefixes of a node's subnets."""
    reserved = 4  # network, gateway, ingress and broadcast address
    containers = 1 + -(-spec.instances // spec.nodes)
    bits = (containers + reserved - 1).bit_length()
    return min(SUBNET_V4_LONGEST, 32 - bits), min(SUBNET_V6_LONGEST, 128 - bits)


def _nodes(spec: Spec) -> Iterator[Node]:
    for number in range(1, spec.nodes + 1):
        name = f"node{number}"
        yield Node(name, f"{spec.name}-{name}", UNDERLAY_V4[number], UNDERLAY_V6[number], number)


def _containers(spec: Spec, nodes: tuple[Node, ...]) -> Iterator[Container]:
    members = [(f"web{i}", nodes[i % len(nodes)], WEB_SERVICE, i) for i in range(spec.instances)]
    members += [(f"client{node.number}", node, CLIENT_SERVICE, node.number - 1) for node in nodes]
    for name, node, service, instance in members:
        yield Container(name, f"{spec.name}-{name}", node, service, instance)


def descriptors(spec: Spec, draining: Iterable[Container] = ()) -> list[Descriptor]:
    """The services of a lab, as they are deployed; these instances of the demo service keep what they have, and get
    nothing new."""
    web = _descriptor(WEB_SERVICE, spec.instances, **WEB)
    web.states.update((it.instance, "draining") for it in draining)
    return [web, _descriptor(CLIENT_SERVICE, spec.nodes, service_ips={})]


def dns_name(service: str, zone: str = Config().naming.zone) -> str:
    """By what containers call a service."""
    return b".".join((*names.of_job(service), zone.encode())).decode()


def _descriptor(service: str, instances: int, **more: Any) -> Descriptor:
    app, namespace, name, service_namespace = service.split(".")
    fixed = {"app": app, "namespace": namespace, "service": name, "service_namespace": service_namespace}
    return Descriptor.model_validate({**fixed, "instances": instances, **more})


def cluster_options(plan: Topology, directory: Path) -> list[str]:
    """The options of `appliance cluster run`, whose files are in `directory`."""
    v4, v6 = prefixes(plan.spec)
    options = {
        "--cluster": "lab",
        "--mqtt": f"{plan.cluster.underlay_v4}:{MQTT_PORT}",
        "--rest": f"127.0.0.1:{REST_PORT}",
        "--state": str(directory / "state"),
        "--runtime": str(directory / "run"),
        "--prefix-v4": str(v4),
        "--prefix-v6": str(v6),
    }
    return [word for option in options.items() for word in option]


def node_config(plan: Topology, node: Node, directory: Path) -> Config:
    """The configuration of a node whose files are in `directory`. Raises SpecError for a wrong setting."""
    raw: dict[str, dict[str, Any]] = {
        "node": {"address": str(plan.tunnel_address(node)), "id": node.id},
        "cluster": {"url": str(plan.cluster.underlay_v4), "port": MQTT_PORT},
        "workers": {"count": plan.spec.workers[min(node.number, len(plan.spec.workers)) - 1]},
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
