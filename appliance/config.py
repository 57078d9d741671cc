"""The configuration: one typed model that validates the file, explains it and prints the example.

Theory of operation
-------------------
`load` reads a TOML file into a frozen `Config`, or raises `ConfigError` that lists everything wrong
with the file, each as `FILE:LINE: key: expected …, got …`. Nothing is guessed and nothing unknown is
accepted: a misspelt key would otherwise be a default that nobody chose.

A field states its default, its expectation and its unit once, in the model. The checks, the example
file, the JSON schema and the error texts are all derived from that statement (`appliance.config_text`
does the printing). Checks that compare keys with each other are in `_disagreements`, a pure function.

A frozen model is shared by whoever needs it. A reload builds a new one and asks `differences` what
changed; a key that is not `is_reloadable` takes effect at the next start.
"""

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from appliance.cluster.broker import parse_urls
from appliance.limits import HOSTS_MAX, SOURCE_PORTS_MAX, WORKERS_MAX
from appliance.toml_lines import Lines, syntax_error

DEFAULT_PATH = Path("/etc/edge-appliance/appliance.toml")

INTERFACE_NAME_MAX = 15
"""IFNAMSIZ less the terminating zero (linux/if.h)."""
SOCKET_PATH_MAX = 107
"""sizeof(sockaddr_un.sun_path) less the terminating zero (unix(7))."""
CPU_MAX = 1023
"""CPU_SETSIZE less one: what an affinity mask of glibc can name (sched_setaffinity(2))."""
MTU_MIN = 1280
"""The least that IPv6 allows on a link (RFC 8200 section 5)."""
PREFIX_V4_MAX, PREFIX_V6_MAX = 30, 126
"""A subnet holds at least its gateway and one container."""
VALUE_WIDTH = 60
"""Characters of a wrong value that an error repeats."""
_SECRET = re.compile(r"pass|secret|token|key|credential", re.IGNORECASE)
"""In the names of keys."""
_USER_INFO = re.compile(r"//[^/\s\"]*@")
"""Of an URL."""

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True)
class Wanted:
    """Metadata of a type that its JSON schema does not describe: what it accepts, in words."""

    text: str


def expected(what: str) -> PydanticCustomError:
    """A validator's error that knows better what would have been right than the type's own words."""
    return PydanticCustomError("expected", "expected {expected}", {"expected": what})


def _network(value: object) -> object:
    """A network from its text; ipaddress would also take integers and bytes, which no file can mean."""
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str) or "/" not in value:
        raise expected(NETWORK)
    try:
        return ip_network(value)
    except ValueError:
        raise expected(_without_host_bits(value) or NETWORK) from None


def _without_host_bits(text: str) -> str | None:
    """The network that `10.18.0.5/26` probably means, or None if it is no network at all."""
    try:
        return f"a network without host bits ({ip_network(text, strict=False)})"
    except ValueError:
        return None


def _network_or_none(value: object) -> object:
    return value if value == "" else _network(value)


def _node_address(value: object) -> object:
    """An address that peers on other machines can send to, or "auto"."""
    if value == "auto":
        return value
    if not isinstance(value, str | IPv4Address | IPv6Address):
        raise ValueError(value)
    address = ip_address(value)
    here_only = address.version == 6 and address.is_link_local
    if address.is_unspecified or address.is_loopback or address.is_multicast or here_only:
        raise expected("an address that other nodes can reach")
    return address


def _absolute(value: object) -> object:
    """A path that means the same in every process, whatever its working directory is."""
    path = Path(value) if isinstance(value, str) else value
    if not isinstance(path, Path) or not path.is_absolute() or "\0" in str(path):
        raise ValueError(value)
    return path


def _absolute_or_none(value: object) -> object:
    return value if value == "" else _absolute(value)


def _socket_path(value: object) -> object:
    path = _absolute(value)
    if len(os.fsencode(str(path))) > SOCKET_PATH_MAX:
        raise ValueError(value)
    return path


def _socket_path_or_none(value: object) -> object:
    return value if value == "" else _socket_path(value)


def _listen_address(value: object) -> object:
    """An address from its text; ipaddress would also take integers and bytes, which no file can mean."""
    if not isinstance(value, str | IPv4Address | IPv6Address):
        raise ValueError(value)
    return ip_address(value)


def _broker_url(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(value)
    if value:
        parse_urls(value)
    return value


def _server(value: object) -> object:
    """An address with a port or without; the text stays as it is."""
    if not isinstance(value, str):
        raise ValueError(value)
    host, _, port = value[1:].partition("]") if value.startswith("[") else value.partition(":")
    if value.startswith("[") or value.count(":") == 1:
        if port and not 1 <= int(port.removeprefix(":")) <= 65535:
            raise ValueError(value)
        ip_address(host)
    else:
        ip_address(value)
    return value


def _matching(pattern: str) -> BeforeValidator:
    """Accepts a string that a regular expression matches as a whole."""

    def check(value: object) -> object:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(value)
        return value

    return BeforeValidator(check)


NETWORK = "a network such as 10.18.0.0/26 or fc00::/120"
Range = Annotated[IPNetwork, BeforeValidator(_network)]
Ranges = Annotated[tuple[Range, ...], Field(strict=False), Wanted("an array of networks")]
SubnetV4 = Annotated[
    IPv4Network | Literal[""],
    BeforeValidator(_network_or_none),
    Wanted('an IPv4 network such as 10.18.0.0/26, or ""'),
]
SubnetV6 = Annotated[
    IPv6Network | Literal[""],
    BeforeValidator(_network_or_none),
    Wanted('an IPv6 network such as fc00::/120, or ""'),
]
NodeAddress = Annotated[
    Literal["auto"] | IPAddress,
    BeforeValidator(_node_address),
    Wanted('"auto" or an IP address such as 192.0.2.1'),
]
NodeId = Annotated[str, _matching("([0-9a-f]{24})?"), Wanted('24 lower-case hexadecimal digits, or ""')]
InterfaceName = Annotated[
    str,  # without %, which makes the kernel see a template, and without anything that needs quoting
    _matching(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{INTERFACE_NAME_MAX - 1}}}"),
    Wanted(f"an interface name of 1 to {INTERFACE_NAME_MAX} letters, digits, '_', '-' or '.'"),
]
InterfaceNames = Annotated[
    tuple[InterfaceName, ...], Field(strict=False), Wanted("an array of interface names such as eth0")
]
TableName = Annotated[
    str, _matching("[A-Za-z][A-Za-z0-9_-]{0,30}"), Wanted("a name of up to 31 letters, digits, '_' or '-'")
]
GroupName = Annotated[str, _matching(r"([a-z_][a-z0-9_-]{0,31})?"), Wanted('the name of a group, or ""')]
AbsolutePath = Annotated[Path, BeforeValidator(_absolute), Wanted("an absolute path")]
OptionalPath = Annotated[Path | Literal[""], BeforeValidator(_absolute_or_none), Wanted('an absolute path, or ""')]
SocketPath = Annotated[
    Path, BeforeValidator(_socket_path), Wanted(f"an absolute path of at most {SOCKET_PATH_MAX} bytes")
]
OptionalSocketPath = Annotated[
    Path | Literal[""],
    BeforeValidator(_socket_path_or_none),
    Wanted(f'an absolute path of at most {SOCKET_PATH_MAX} bytes, or ""'),
]
ListenAddress = Annotated[
    IPv4Address | IPv6Address, BeforeValidator(_listen_address), Wanted("an IP address such as 127.0.0.1 or ::")
]
BrokerAddress = Annotated[
    str,
    BeforeValidator(_broker_url),
    Wanted('a host, mqtt://host:port or mqtts://host:port, or "", or several with commas'),
]
UserName = Annotated[
    str,
    _matching(r"([A-Za-z0-9_.@-]{1,255})?"),
    Wanted("a name of letters, digits, '_', '-', '.' or '@', or \"\""),
]
_ZONE = r"(?=.{1,100}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*\.?"
ZoneName = Annotated[str, _matching(_ZONE), Wanted("a domain of at most 100 characters such as svc.example")]
ZoneNames = Annotated[tuple[ZoneName, ...], Field(strict=False), Wanted("an array of domains")]
Server = Annotated[str, BeforeValidator(_server), Wanted("an address such as 192.0.2.53 or [2001:db8::1]:5353")]
Servers = Annotated[tuple[Server, ...], Field(strict=False), Wanted("an array of addresses such as 192.0.2.53")]
Cpu = Annotated[int, Field(ge=0, le=CPU_MAX)]
Cpus = Annotated[tuple[Cpu, ...], Field(strict=False), Wanted(f"an array of integers from 0 to {CPU_MAX}")]


def _key(
    default: object,
    text: str,
    *,
    unit: str = "",
    reloadable: bool = False,
    ge: int | None = None,
    le: int | None = None,
) -> Any:
    """One key: its default as TOML has it, what it does, its unit, whether a reload applies it, its range."""
    extra: JsonDict = {"unit": unit, "reloadable": reloadable}
    return Field(default, description=text, json_schema_extra=extra, ge=ge, le=le)


class Section(BaseModel):
    """A table of the file: frozen, nothing unknown, no conversion between types (`"1"` is not 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class Node(Section):
    """Who this node is."""

    id: NodeId = _key("", "Identity in the cluster: 24 hexadecimal digits. Empty: not a member of a cluster.")
    address: NodeAddress = _key(
        "auto",
        "Underlay address that the other nodes send to. auto: the source address of the default route.",
    )


class Tunnel(Section):
    """The overlay between nodes: one plain IP packet in each UDP datagram."""

    port: int = _key(50103, "UDP port that this node receives the overlay on.", ge=1, le=65535)
    advertised_port: int = _key(
        0, "UDP port that the others send to, where a NAT changes it. 0: the same as port.", ge=0, le=65535
    )
    source_ports: int = _key(
        12,
        "UDP source ports of each worker, chosen by the flow, so that the underlay and the receiver spread "
        "flows over paths and queues. 0: everything leaves from tunnel.port.",
        unit="ports a worker",
        ge=0,
        le=SOURCE_PORTS_MAX,
    )
    learn_hosts: Literal["known", "any", "off"] = _key(
        "known",
        "Whose packets teach where their senders live, so that an answer needs no question to the cluster. "
        "known: those of the cluster's nodes, and packets from anybody else are dropped; any: everybody's, only for an "
        "underlay that nobody else can send on; off: nobody's, and only senders that the tables have are let in.",
    )
    mtu: int = _key(
        1450,
        "MTU inside the overlay: of the TUN device, the bridge and the containers' links. The underlay "
        "carries 28 bytes more (IPv4) or 48 (IPv6); on a path that carries less, senders are told to send less.",
        unit="bytes",
        ge=MTU_MIN,
        le=65000,
    )
    socket_buffer: int = _key(
        8388608, "Send and receive buffer of each UDP socket.", unit="bytes", ge=65536, le=1 << 30
    )


class Network(Section):
    """Interfaces and addresses on this node."""

    bridge: InterfaceName = _key("edge-br0", "Bridge that the containers' links are attached to.")
    tun: InterfaceName = _key("edge-tun0", "TUN device that the workers read.")
    txqueuelen: int = _key(
        1000, "Packets that each queue of the TUN device holds.", unit="packets", ge=16, le=1_000_000
    )
    subnet_v4: SubnetV4 = _key(
        "",
        "Subnet of this node's containers; the first address is the gateway. Empty: no IPv4 for containers.",
    )
    subnet_v6: SubnetV6 = _key(
        "",
        "Subnet of this node's containers; the first address is the gateway. Empty: no IPv6 for containers.",
    )
    overlay: Ranges = _key(["10.16.0.0/12", "fc00::/7"], "Ranges that are routed into the TUN device.")
    services: Ranges = _key(["10.30.0.0/16", "fdff::/16"], "Ranges of ServiceIPs; each lies inside a range of overlay.")
    guest: Literal["nat", "macvtap"] = _key(
        "nat",
        "What unikernels and virtual machines find: nat, a TAP device behind fixed addresses (crosvm); macvtap, one "
        "with the instance's own addresses.",
    )


class Firewall(Section):
    """nftables rules of this node: exposed ports, and the containers' way out. Others' tables are left alone."""

    table: TableName = _key("edge-appliance", "Name of our table (family inet).")
    egress: bool = _key(
        True, "Containers reach networks outside the overlay, with the uplink's address.", reloadable=True
    )
    uplinks: InterfaceNames = _key(
        [], "Links that containers go out by. Empty: every link but our own.", reloadable=True
    )
    accept: bool = _key(
        True,
        "Accept our own links in forward chains of others (Docker, firewalld, ufw) that drop by default; a packet that "
        "any table drops is lost.",
        reloadable=True,
    )


class Workers(Section):
    """Processes that carry packets."""

    count: int = _key(
        0,
        "Number of workers. 0: one for each CPU of workers.cpus, or for each online CPU.",
        ge=0,
        le=WORKERS_MAX,
    )
    cpus: Cpus = _key([], "CPUs that the workers are pinned to, in order. Empty: every online CPU.")
    pin: bool = _key(True, "Pin each worker to one CPU.")
    busy_poll: int = _key(
        0,
        "How long a worker looks for packets before it sleeps, where they have lately come that soon: less latency for "
        "more CPU time. 0: not at all.",
        unit="microseconds",
        ge=0,
        le=1000,
    )
    flows: int = _key(65536, "Flows that each worker remembers.", unit="flows a worker", ge=1024, le=16_777_216)
    user: UserName = _key(
        "", "User that the workers run as. Empty: edge-appliance if there is one, else a number that nobody has."
    )


class Offload(Section):
    """Super-packets. Each is probed at start and switched off if the kernel refuses; false: never tried."""

    tun_tso: bool = _key(True, "Read TCP super-packets (TSO) from the TUN device.")
    tun_uso: bool = _key(True, "Read UDP super-packets (USO) from the TUN device. Needs Linux 6.2.")
    udp_gso: bool = _key(True, "Send many datagrams with one system call (UDP_SEGMENT).")
    udp_gro: bool = _key(True, "Receive many datagrams with one system call (UDP_GRO).")
    coalesce: bool = _key(True, "Join adjacent segments of a flow before they are written to the TUN device.")


class Tables(Section):
    """Capacities of the shared tables, and where they come from without a cluster."""

    hosts: int = _key(131072, "Namespace addresses of all nodes.", unit="addresses", ge=16, le=HOSTS_MAX)
    services: int = _key(131072, "ServiceIPs and instance IPs.", unit="addresses", ge=16, le=4_194_304)
    nodes: int = _key(8192, "Nodes of the cluster.", unit="nodes", ge=16, le=1_048_576)
    backends: int = _key(262144, "Backends of all ServiceIPs together.", unit="backends", ge=16, le=16_777_216)
    maglev: int = _key(1024, "ServiceIPs of the policy maglev; 4 KiB each.", unit="addresses", ge=1, le=65_536)
    static: OptionalPath = _key(
        "", "JSON file with hosts and services: a list of table-query results. Empty: none.", reloadable=True
    )


class Cluster(Section):
    """The cluster that this node is a member of: its broker, and how long news from it counts."""

    url: BrokerAddress = _key(
        "",
        "Broker of the cluster. With mqtts:// the connection is encrypted, as it is for a host alone with any of ca, "
        "certificate and key; it is never made in cleartext then. Several brokers of one cluster, separated by commas, "
        "are tried in turn. Empty: no cluster.",
    )
    port: int = _key(10003, "Port of the broker, where url has none.", ge=1, le=65535)
    ca: OptionalPath = _key("", "Certificates (PEM) that the broker's is checked with. Empty: the system's.")
    certificate: OptionalPath = _key("", "Certificate (PEM) that this node shows to the broker. Empty: none.")
    key: OptionalPath = _key("", "Private key (PEM) of certificate, in a file that only its owner may read.")
    user: UserName = _key("", "User name at the broker. Empty: none.")
    password_file: OptionalPath = _key(
        "", "File whose first line is the password of user, and that only its owner may read. Empty: none."
    )
    keepalive: int = _key(
        3,
        "Longest silence of this node at the broker, which gives it up after 1.5 times as long. 3: a node that was "
        "unplugged has left the others' tables within 5 s. More spares a metered uplink some bytes.",
        unit="seconds",
        ge=1,
        le=3600,
    )
    query_timeout: int = _key(5, "How long the answer to a question is waited for.", unit="seconds", ge=1, le=60)
    interest: int = _key(
        10,
        "Time without use after which a service is forgotten, unless an instance of it runs here.",
        unit="seconds",
        ge=1,
        le=86400,
    )
    refresh: int = _key(
        60,
        "Time after which a known service is asked for again, in case a notice got lost.",
        unit="seconds",
        ge=5,
        le=86400,
    )


class Naming(Section):
    """Names: DNS and mDNS for the containers, on the bridge."""

    enabled: bool = _key(True, "Run the resolver.")
    zone: ZoneName = _key("local", "Domain that the services' names are in.", reloadable=True)
    extra_zones: ZoneNames = _key([], "Further domains with the same names.", reloadable=True)
    port: int = _key(53, "Port on the bridge's addresses, UDP and TCP.", ge=1, le=65535)
    mdns: bool = _key(True, "Answer on mDNS too, where zone is local.")
    user: UserName = _key(
        "", "User that the resolver runs as. Empty: edge-appliance if there is one, else a number that nobody has."
    )
    ttl: int = _key(5, "How long an answer counts.", unit="seconds", reloadable=True, ge=0, le=86400)
    ttl_down: int = _key(
        1, "How long an answer counts while no instance is up.", unit="seconds", reloadable=True, ge=0, le=86400
    )
    ttl_negative: int = _key(
        2, "How long it counts that a name or a record does not exist.", unit="seconds", reloadable=True, ge=0, le=3600
    )
    when_down: Literal["address", "nxdomain", "nodata"] = _key(
        "address", "What the name of a service gives while no instance of it is up.", reloadable=True
    )
    cluster_wait: int = _key(
        2, "How long a question for an unknown service waits for the cluster.", unit="seconds", reloadable=True,
        ge=1, le=30,
    )  # fmt: skip
    upstreams: Servers = _key(
        [], "Servers that get every other question. Empty: those of the host's resolv.conf.", reloadable=True
    )
    upstream_timeout: int = _key(
        3, "How long their answer is waited for.", unit="seconds", reloadable=True, ge=1, le=30
    )
    cache: int = _key(10000, "Their answers that are kept.", unit="answers", reloadable=True, ge=1, le=1_000_000)


class Health(Section):
    """Checks of the instances on this node, as their services' descriptors want them."""

    commands: bool = _key(
        False,
        "Make checks that are commands (health.command). They run with this node's files and the appliance's rights: "
        "whoever may deploy to the cluster, or is its broker, may run programs here. false: such a check is a bad one.",
        reloadable=True,
    )


class Api(Section):
    """The local API that the commands of this node use."""

    socket: SocketPath = _key("/run/edge-appliance/api.sock", "Unix socket of the API.")
    group: GroupName = _key("", "Group that may use the socket, which has mode 0660. Empty: root's group.")
    nodeengine: OptionalSocketPath = _key(
        "",
        "A second path of the socket, for an existing NodeEngine, which expects /etc/netmanager/netmanager.sock. "
        "Empty: none.",
    )
    docker: OptionalSocketPath = _key(
        "",
        "Socket of the network driver for Docker, such as /run/edge-appliance/docker.sock with edge-appliance.spec in "
        "/etc/docker/plugins, or /run/docker/plugins/edge-appliance.sock. Empty: none.",
    )
    tcp_port: int = _key(
        0,
        "TCP port of the API. Whoever reaches it rules this node: there is no authentication. 0: none.",
        ge=0,
        le=65535,
    )
    tcp_address: ListenAddress = _key("127.0.0.1", "Address that tcp_port is opened on.")


class Metrics(Section):
    """What monitoring systems read: /metrics, /healthz and /readyz, which the API's socket also has."""

    port: int = _key(
        0, "TCP port of the three pages, where nothing can be changed. 0: only the API has them.", ge=0, le=65535
    )
    address: ListenAddress = _key("127.0.0.1", "Address that port is opened on.")


class FlowLog(Section):
    """Records of flows that begin and end, one JSON object a line."""

    enabled: bool = _key(False, "Write the flow log.", reloadable=True)
    sample: int = _key(
        1, "One flow in so many is logged, with beginning and end. 1: all.", unit="flows", reloadable=True,
        ge=1, le=1_000_000,
    )  # fmt: skip
    rate: int = _key(
        1000, "Records that are written in the long run; of more, a record says how many there were.",
        unit="records a second", reloadable=True, ge=1, le=100_000,
    )  # fmt: skip
    file: OptionalPath = _key(
        "", "File that records are added to; opened anew at a reload. Empty: standard error, with the other logs.",
        reloadable=True,
    )  # fmt: skip


class Paths(Section):
    """Directories; the appliance creates them."""

    runtime: AbsolutePath = _key("/run/edge-appliance", "Sockets and what does not survive a reboot.")
    state: AbsolutePath = _key("/var/lib/edge-appliance", "What survives a reboot.")
    cache: AbsolutePath = _key("/var/cache/edge-appliance", "Compiled packet path; may be deleted at any time.")


class Log(Section):
    """Log lines on standard error."""

    level: Literal["debug", "info", "warning", "error"] = _key(
        "info", "Least severity that is logged.", reloadable=True
    )


class Config(Section):
    """Configuration of the edge appliance."""

    node: Node = Node()
    tunnel: Tunnel = Tunnel()
    network: Network = Network()
    firewall: Firewall = Firewall()
    workers: Workers = Workers()
    offload: Offload = Offload()
    tables: Tables = Tables()
    cluster: Cluster = Cluster()
    naming: Naming = Naming()
    health: Health = Health()
    api: Api = Api()
    metrics: Metrics = Metrics()
    flowlog: FlowLog = FlowLog()
    paths: Paths = Paths()
    log: Log = Log()

    @model_validator(mode="after")
    def _agree(self, info: ValidationInfo) -> Self:
        """Reports each disagreement between keys at its key, as pydantic reports a wrong value at its own."""
        cpus = (info.context or {}).get("cpus")
        errors = [
            InitErrorDetails(type=expected(it.expected), loc=it.loc, input=it.got) for it in _disagreements(self, cpus)
        ]
        if errors:
            raise ValidationError.from_exception_data("Config", errors)
        return self


# --- Keys that must agree with each other -------------------------------------------------------


@dataclass(frozen=True)
class Disagreement:
    """A value that is right by itself and wrong beside another one."""

    loc: tuple[str | int, ...]
    expected: str
    got: object


def _disagreements(config: Config, cpus: int | None) -> Iterator[Disagreement]:
    """Everything that no key can tell by itself. `cpus` is the machine's number of CPUs, None if unknown."""
    network = config.network
    if network.bridge == network.tun:
        yield Disagreement(("network", "tun"), "a name other than network.bridge", network.tun)
    yield from _everything(network.overlay)
    yield from _overlapping("overlay", network.overlay)
    yield from _overlapping("services", network.services)
    yield from _services_outside(network)
    yield from _wrong_subnet("subnet_v4", network.subnet_v4, PREFIX_V4_MAX, network)
    yield from _wrong_subnet("subnet_v6", network.subnet_v6, PREFIX_V6_MAX, network)
    yield from _captured_address(config)
    yield from _wrong_cpus(config.workers, cpus)
    yield from _half_secured(config.cluster)
    if config.api.nodeengine == config.api.socket:
        yield Disagreement(("api", "nodeengine"), "a path other than api.socket", str(config.api.nodeengine))


def overlap(one: IPNetwork, other: IPNetwork) -> bool:
    """Whether two networks share an address; of different families they never do."""
    return one.version == other.version and one.overlaps(other)


def inside(inner: IPNetwork, ranges: Iterable[IPNetwork]) -> bool:
    """Whether one of the ranges holds the whole of a network."""
    return any(overlap(inner, outer) and inner.prefixlen >= outer.prefixlen for outer in ranges)


def _everything(overlay: tuple[IPNetwork, ...]) -> Iterator[Disagreement]:
    """A range without a prefix would take the underlay's own packets into the TUN: a loop."""
    for index, network in enumerate(overlay):
        if network.prefixlen == 0:
            yield Disagreement(("network", "overlay", index), "a range that leaves room for the underlay", network)


def _overlapping(key: str, ranges: tuple[IPNetwork, ...]) -> Iterator[Disagreement]:
    for index, network in enumerate(ranges):
        clash = next((other for other in ranges[:index] if overlap(network, other)), None)
        if clash is not None:
            yield Disagreement(("network", key, index), f"a range that does not overlap {clash}", network)


def _services_outside(network: Network) -> Iterator[Disagreement]:
    """A ServiceIP that is not routed into the TUN never reaches a worker."""
    for index, services in enumerate(network.services):
        if not inside(services, network.overlay):
            loc = ("network", "services", index)
            yield Disagreement(loc, "a range inside one of network.overlay", services)


def _wrong_subnet(key: str, subnet: IPNetwork | Literal[""], longest: int, network: Network) -> Iterator[Disagreement]:
    if subnet == "":
        return
    loc = ("network", key)
    if subnet.prefixlen > longest:
        yield Disagreement(loc, f"a subnet of /{longest} or larger (a gateway and a container)", subnet)
    if not inside(subnet, network.overlay):
        yield Disagreement(loc, "a subnet inside one of network.overlay", subnet)
    for services in network.services:
        if overlap(subnet, services):
            yield Disagreement(loc, f"a subnet that does not overlap network.services ({services})", subnet)


def _captured_address(config: Config) -> Iterator[Disagreement]:
    """Packets to an underlay address inside the overlay's ranges would be routed into the TUN: a loop."""
    address = config.node.address
    if address == "auto":
        return
    captured = next((net for net in config.network.overlay if address in net), None)
    if captured is not None:
        yield Disagreement(("node", "address"), f"an address outside network.overlay ({captured})", address)


def _wrong_cpus(workers: Workers, cpus: int | None) -> Iterator[Disagreement]:
    for index, cpu in enumerate(workers.cpus):
        loc = ("workers", "cpus", index)
        if cpu in workers.cpus[:index]:
            yield Disagreement(loc, "each CPU once", cpu)
        if cpus is not None and cpu >= cpus:
            yield Disagreement(loc, f"a CPU of this machine (0 to {cpus - 1})", cpu)


def _half_secured(cluster: Cluster) -> Iterator[Disagreement]:
    """Credentials that could not be used, or would be sent in cleartext against the file's evident intention."""
    if cluster.certificate and not cluster.key:
        yield Disagreement(("cluster", "key"), "a path, as cluster.certificate has one", cluster.key)
    if cluster.key and not cluster.certificate:
        yield Disagreement(("cluster", "certificate"), "a path, as cluster.key has one", cluster.certificate)
    if cluster.password_file and not cluster.user:
        yield Disagreement(("cluster", "user"), "a name, as cluster.password_file has a path", cluster.user)
    if cluster.url.startswith("mqtt:") and (cluster.ca or cluster.certificate or cluster.key):
        wanted = "an mqtts:// URL, as cluster.ca, cluster.certificate or cluster.key has a path"
        yield Disagreement(("cluster", "url"), wanted, cluster.url)


# --- Errors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a file. `line` counts from 1; None where the file as a whole is meant."""

    file: str
    line: int | None
    key: str
    expected: str
    got: str

    def __str__(self) -> str:
        """FILE:LINE: key: expected …, got …"""
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.key}: expected {self.expected}, got {self.got}"


class ConfigError(Exception):
    """A configuration that cannot be used. `str()` is one line for each problem, in the file's order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line or 0))
        super().__init__("\n".join(map(str, self.problems)))


# --- Reading ------------------------------------------------------------------------------------


def load(path: Path, cpus: int | None = None) -> Config:
    """The configuration in a file for a machine of `cpus` CPUs, by default this one. Raises ConfigError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError([Problem(str(path), None, "file", "a readable file", reason)]) from None
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{raw[error.start]:02x}"
        raise ConfigError([Problem(str(path), line, "syntax", "UTF-8", got)]) from None
    return parse(text, str(path), os.cpu_count() if cpus is None else cpus)


def parse(text: str, file: str, cpus: int | None = None) -> Config:
    """The configuration in a TOML text; `file` is its name in errors. Raises ConfigError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line, reason = syntax_error(error, text)
        raise ConfigError([Problem(file, line, "syntax", "TOML", reason)]) from None
    return from_data(data, file, cpus, lambda: Lines(text))


def from_data(
    data: Mapping[str, Any], source: str, cpus: int | None = None, lines: Callable[[], Lines] | None = None
) -> Config:
    """The configuration in TOML's data; `source` is named in errors. Raises ConfigError.

    `cpus`: of the machine that it is for, None if unknown. `lines` is called for the lines of what is wrong.
    """
    try:
        return Config.model_validate(data, context={"cpus": cpus})
    except ValidationError as error:
        raise ConfigError(_problems(error.errors(), source, lines() if lines else None)) from None


def _problems(errors: Iterable[ErrorDetails], source: str, lines: Lines | None) -> list[Problem]:
    """One problem for each wrong key: pydantic reports one for each member of a union."""
    found: dict[tuple[str | int, ...], Problem] = {}
    for error in errors:
        loc = _known_location(error["loc"])
        if loc not in found:
            wanted, got = _expectation(error, loc), _shown(loc, error["input"])
            found[loc] = Problem(source, lines.of(loc) if lines else None, dotted(loc), wanted, got)
    return list(found.values())


def _known_location(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The part of pydantic's location that is in the file: section, key, index; not the union's member."""
    length = 3 if len(loc) > 2 and isinstance(loc[2], int) else 2
    return loc[:length]


def dotted(loc: tuple[str | int, ...]) -> str:
    """`("network", "overlay", 1)` as `network.overlay[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _shown(loc: tuple[str | int, ...], value: object) -> str:
    """A value as the file would have it, cut to VALUE_WIDTH, and without what may be a secret that is misplaced."""
    if _is_secret(loc, value):
        return "a text that is not shown, as it may be a secret"
    text = _USER_INFO.sub("//…@", json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= VALUE_WIDTH else text[: VALUE_WIDTH - 1] + "…"


def _is_secret(loc: tuple[str | int, ...], value: object) -> bool:
    """Whether somebody may have written a secret instead of the path of its file, or in a key of their own."""
    if isinstance(value, Mapping):
        return any(_is_secret((*loc, name), it) for name, it in value.items())
    if isinstance(value, list):
        return any(_is_secret(loc, it) for it in value)
    named = _SECRET.search(" ".join(map(str, loc))) is not None
    return isinstance(value, str) and ("-----BEGIN" in value or (named and value != "" and not value.startswith("/")))


def _expectation(error: ErrorDetails, loc: tuple[str | int, ...]) -> str:
    """What would have been right at a location."""
    if error["type"] == "expected":
        return str(error["ctx"]["expected"])
    if error["type"] == "extra_forbidden":
        return _nearest(loc)
    if len(loc) == 1:
        return f"a table [{loc[0]}]"
    return expectation(str(loc[0]), str(loc[1]), element=len(loc) > 2)


def _nearest(loc: tuple[str | int, ...]) -> str:
    """A sentence for an unknown key: the one that was probably meant, else all that exist."""
    name = str(loc[-1])
    names = list(sections()) if len(loc) == 1 else list(sections()[str(loc[0])].model_fields)
    close = get_close_matches(name, names, n=1)
    if close:
        return f"a known key (did you mean {dotted((*loc[:-1], close[0]))}?)"
    elsewhere = [f"{section}.{name}" for section, model in sections().items() if name in model.model_fields]
    if elsewhere:
        return f"a known key (did you mean {' or '.join(elsewhere)}?)"
    return f"a known key ({', '.join(names)})"


# --- What the model says about itself -----------------------------------------------------------


def expectation(section: str, key: str, element: bool = False) -> str:
    """What a key accepts, or each element of its array: its type's own words, else made from its schema."""
    model = sections()[section]
    wanted = (it.text for it in model.model_fields[key].metadata if isinstance(it, Wanted))
    schema = model.model_json_schema()["properties"][key]
    return _in_words(schema["items"]) if element else next(wanted, None) or _in_words(schema)


def _in_words(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    if "minimum" in schema and "maximum" in schema:
        return f"an integer from {schema['minimum']} to {schema['maximum']}"
    return {"boolean": "true or false", "string": "a string"}[schema["type"]]


@dataclass(frozen=True)
class Key:
    """One configuration key as the example file, the schema's readers and a reload need it."""

    section: str
    name: str
    default: object
    description: str
    unit: str
    reloadable: bool
    expected: str

    @property
    def dotted(self) -> str:
        """`section.name`"""
        return f"{self.section}.{self.name}"


def sections() -> Mapping[str, type[Section]]:
    """The tables of the file by name, in the model's order."""
    return {name: type(field.default) for name, field in Config.model_fields.items()}


def keys() -> Iterator[Key]:
    """Every key, in the model's order."""
    for section, model in sections().items():
        for name, field in model.model_fields.items():
            extra = _extra(field)
            yield Key(
                section=section,
                name=name,
                default=field.default,
                description=field.description or "",
                unit=str(extra["unit"]),
                reloadable=bool(extra["reloadable"]),
                expected=expectation(section, name),
            )


def _extra(field: FieldInfo) -> Mapping[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, Mapping) else {}


@dataclass(frozen=True)
class Change:
    """A key that two configurations differ in."""

    key: str
    old: object
    new: object


def differences(old: Config, new: Config) -> list[Change]:
    """Every key that differs between two configurations, in the model's order."""
    found = []
    for key in keys():
        before, after = (getattr(getattr(config, key.section), key.name) for config in (old, new))
        if before != after:
            found.append(Change(key.dotted, before, after))
    return found


def is_reloadable(key: str) -> bool:
    """Whether a reload applies a key (`section.name`) at once. Raises KeyError if there is none."""
    return {it.dotted: it.reloadable for it in keys()}[key]
