"""The cluster's messages as values: parsed, checked, and turned into table entries.

A table-query result lists the instances of one job with their addresses and ServiceIPs. Unknown keys are ignored, as
both sides add some; a known key with a wrong value is an error that names it. An instance that has no addresses yet
is registered but not deployed, and skipped. Types of ServiceIPs, in any case: ``instance_ip`` and ``InstanceNumber``
belong to one instance; the names of policies (``RR``, ``closest``, ``least-flows``, ``maglev``) are balanced so; an
unknown type is balanced as ``RR``, never taken for an instance's own address.

Additions that other nodes ignore: an instance's ``weight`` and ``state`` (``up``, ``draining``, ``down``), a
ServiceIP's ``sticky`` (seconds) and ``hash_port``. An instance that is draining or down has weight 0 in every balanced
ServiceIP; it keeps its addresses, as it may itself call others. A notice about a job may list addresses that are gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from operator import attrgetter
from pathlib import Path
from socket import AF_INET, AF_INET6, inet_pton
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from appliance import limits
from appliance.tables.catalogue import POLICIES, Host, Service
from appliance.tables.layout import IPAddress, TableIPv4, TableIPv6

INSTANCE_TYPES = frozenset({"instance_ip", "instancenumber"})
_PART = r"[^.\s/+#\x00-\x1f\x7f]+"  # nothing that means something in a topic
JOB_NAME = rf"^{_PART}(\.{_PART}){{3}}$"  # app.appns.service.servicens
NO_ADDRESS = ("", "<nil>")  # how existing nodes and managers write an address that is missing


class MessageError(ValueError):
    """A message that does not say what it should; the text names the field and what was expected."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


def _address(value: object) -> IPAddress | None:
    """An address in text; numbers, which ``ipaddress`` would also take, no message means.

    The C library parses: a message of a large cluster has as many as 200,000, and ``ip_address`` takes 5 µs for each.
    """
    if value is None or isinstance(value, IPv4Address | IPv6Address):
        return value
    if not isinstance(value, str):
        raise ValueError("expected an IP address")
    if value in NO_ADDRESS:
        return None
    try:
        return TableIPv6(inet_pton(AF_INET6, value)) if ":" in value else TableIPv4(inet_pton(AF_INET, value))
    except (OSError, ValueError):  # ValueError: a character that no C string can have
        raise ValueError("expected an IP address") from None


def _v4(value: object) -> IPv4Address | None:
    address = _address(value)
    if isinstance(address, IPv6Address):
        raise ValueError("expected an IPv4 address")
    return address


def _v6(value: object) -> IPv6Address | None:
    address = _address(value)
    if isinstance(address, IPv4Address):
        raise ValueError("expected an IPv6 address")
    return address


def _present(value: object) -> IPAddress:
    address = _address(value)
    if address is None:
        raise ValueError("expected an IP address")
    return address


# Plain: pydantic's own validation of a value that is an address already would be made from its text once more.
V4 = Annotated[IPv4Address | None, PlainValidator(_v4)]
V6 = Annotated[IPv6Address | None, PlainValidator(_v6)]
Any46 = Annotated[IPv4Address | IPv6Address | None, PlainValidator(_address)]


class ServiceIp(_Message):
    """One address of a service, by policy."""

    type: str = Field(alias="IpType")
    v4: V4 = Field(None, alias="Address")
    v6: V6 = Field(None, alias="Address_v6")
    sticky: int = Field(0, ge=0, le=limits.STICKY_MAX_S)
    hash_port: bool = False

    @property
    def is_instance(self) -> bool:
        """Whether the address is one instance's own."""
        return self.type.lower() in INSTANCE_TYPES

    @property
    def policy(self) -> str:
        """The policy in the tables' words."""
        name = self.type.lower()
        return "instance" if self.is_instance else name if name in POLICIES else "rr"


class Instance(_Message):
    """One instance of a job. Without a node it is not deployed."""

    number: int = Field(alias="instance_number", ge=0)
    address_v4: V4 = Field(None, alias="namespace_ip")
    address_v6: V6 = Field(None, alias="namespace_ip_v6")
    node: Any46 = Field(None, alias="host_ip")
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(None, alias="host_port")
    service_ips: tuple[ServiceIp, ...] = Field((), alias="service_ip")
    weight: int = Field(1, ge=0, le=limits.WEIGHT_MAX)
    state: Literal["up", "draining", "down"] = "up"

    @property
    def is_deployed(self) -> bool:
        """Whether packets can be sent to it."""
        return self.node is not None and self.port is not None and bool(self.address_v4 or self.address_v6)


class ExposedPort(_Message):
    """A port on which every instance of a job serves."""

    port: int = Field(ge=1, le=65535)
    protocol: Literal["tcp", "udp"] = "tcp"
    name: str = ""


class Exposure(_Message):
    """A port of nodes that leads to a job. ``to``: the instances' port, else the same."""

    port: int = Field(ge=1, le=65535)
    to: Annotated[int, Field(ge=1, le=65535)] | None = None
    protocol: Literal["tcp", "udp"] = "tcp"
    address: Any46 = None
    nodes: Literal["all", "hosting"] | tuple[str, ...] = "all"
    policy: str = ""
    prefer: Literal["policy", "local"] = "policy"

    @property
    def target(self) -> int:
        """The instances' port."""
        return self.port if self.to is None else self.to


class Http(_Message):
    """A GET that is answered with a status from 200 to 399."""

    port: int = Field(ge=1, le=65535)
    path: str = Field("/", pattern=r"^/[!-~]*$")


class Health(_Message):
    """How the node that hosts an instance checks it; times in seconds."""

    tcp: Annotated[int, Field(ge=1, le=65535)] | None = None
    http: Http | None = None
    command: tuple[str, ...] = ()
    interval: float = Field(5.0, ge=0.1, le=3600)
    timeout: float = Field(2.0, ge=0.1, le=60)
    rise: int = Field(1, ge=1, le=100)
    fall: int = Field(3, ge=1, le=100)


class Exposed(_Message):
    """On which nodes a job has ports."""

    nodes: Literal["all", "hosting"] | tuple[str, ...] = "all"


class TableQueryResult(_Message):
    """The answer to a table query: one job and its instances.

    What follows ``query_key`` is what our own manager adds for names: ServiceIPs that the job has even without an
    instance, the policy behind its plain name, ports, metadata, and the jobs that its instances are going to call; the
    ports that nodes open for it, and how its instances are checked.
    """

    job: str = Field(alias="app_name")
    instances: tuple[Instance, ...] = Field((), alias="instance_list")
    query_key: str = ""
    service_ips: tuple[ServiceIp, ...] = ()
    default_policy: str = ""
    ports: tuple[ExposedPort, ...] = ()
    metadata: dict[str, str] = {}
    needs: tuple[str, ...] = ()
    exposed: tuple[Exposure, ...] = ()
    health: Health | None = None


class SubnetworkResult(_Message):
    """The answer to a request for subnets: network addresses. Lengths are an addition; without them, 26 and 120."""

    v4: V4 = Field(None, alias="address")
    v6: V6 = Field(None, alias="addressv6")
    prefix_v4: int = Field(26, alias="prefix", ge=1, le=30)
    prefix_v6: int = Field(120, alias="prefixv6", ge=1, le=126)


class ClusterNode(_Message):
    """Where a node of the cluster is reached. ``overlay`` 2: it runs this appliance, or one that works alike."""

    address: Annotated[IPv4Address | IPv6Address, PlainValidator(_present)] = Field(alias="host_ip")
    port: int = Field(alias="host_port", ge=1, le=65535)
    subnets: tuple[IPv4Network | IPv6Network, ...] = ()
    overlay: int = 2


class Notice(_Message):
    """Something about a job is new. ``gone``: namespace addresses of instances that it has no more."""

    gone: tuple[Any46, ...] = ()


_RESULTS = TypeAdapter(list[TableQueryResult])
_Answer = TypeVar("_Answer", TableQueryResult, SubnetworkResult, ClusterNode, Exposed, Notice)


def parse_results(data: bytes | str, source: str) -> list[TableQueryResult]:
    """A list of table-query results in JSON. Raises MessageError with the first wrong field."""
    try:
        return _RESULTS.validate_json(data)
    except ValidationError as error:
        raise MessageError(f"{source}: {_first(error, 'the whole file')}") from error


def parse_answer(kind: type[_Answer], data: bytes) -> _Answer:
    """One answer of the cluster in JSON. Raises MessageError with the first wrong field."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise MessageError(_first(error, "the whole message")) from error


def read_results(path: Path) -> list[TableQueryResult]:
    """The results in a file. Raises MessageError, also if it cannot be read."""
    try:
        return parse_results(path.read_bytes(), str(path))
    except OSError as error:
        raise MessageError(f"{path}: expected a readable file: {error.strerror}") from error


def _first(error: ValidationError, whole: str) -> str:
    details = error.errors()[0]
    where = ".".join(str(part) for part in details["loc"]) or whole
    return f"{where}: {details['msg'].removeprefix('Value error, ')}"


_number = attrgetter("number")


def entries(results: Iterable[TableQueryResult], node: IPAddress, port: int) -> tuple[list[Host], list[Service]]:
    """Table entries of all deployed instances, as seen from the node with this address and advertised port.

    An address that two jobs claim goes to the first by name, so that every node decides alike.
    """
    hosts: dict[IPAddress, Host] = {}
    found: dict[IPAddress, _Behind] = {}
    for result in sorted(results, key=lambda result: result.job):
        _add(hosts, found, result, node, port)
    return list(hosts.values()), list(_services(found).values())


def entries_of_job(
    result: TableQueryResult, node: IPAddress, port: int
) -> tuple[dict[IPAddress, Host], dict[IPAddress, Service]]:
    """The same of one job, by address, whoever else claims an address of it."""
    hosts: dict[IPAddress, Host] = {}
    found: dict[IPAddress, _Behind] = {}
    _add(hosts, found, result, node, port)
    return hosts, _services(found)


def _add(
    hosts: dict[IPAddress, Host], found: dict[IPAddress, _Behind], result: TableQueryResult, node: IPAddress, port: int
) -> None:
    for instance in sorted(result.instances, key=_number):
        if instance.is_deployed:
            _add_hosts(hosts, result.job, instance, node, port)
            _add_backends(found, result.job, instance)


def _services(found: dict[IPAddress, _Behind]) -> dict[IPAddress, Service]:
    return {address: behind.service(address) for address, behind in found.items()}


@dataclass(slots=True)
class _Behind:
    """What is behind a ServiceIP, while it is collected from a job's instances."""

    job: str
    kind: ServiceIp
    targets: list[IPAddress] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)

    def service(self, address: IPAddress) -> Service:
        weights = tuple(self.weights) if self.weights.count(1) < len(self.weights) else ()
        return Service(
            address,
            self.kind.policy,
            tuple(self.targets),
            weights,
            self.job,
            sticky=self.kind.sticky,
            hash_port=self.kind.hash_port,
        )


def _own_ips(instance: Instance) -> tuple[IPAddress | None, IPAddress | None]:
    """The instance IPs: of each family the last one listed, as existing nodes take it."""
    v4: IPAddress | None = None
    v6: IPAddress | None = None
    for service_ip in instance.service_ips:
        if service_ip.is_instance:
            v4, v6 = service_ip.v4 or v4, service_ip.v6 or v6
    return v4, v6


def _add_hosts(hosts: dict[IPAddress, Host], job: str, instance: Instance, node: IPAddress, port: int) -> None:
    assert instance.node is not None
    assert instance.port is not None
    local = (instance.node, instance.port) == (node, port)
    owner, is_down = f"{job}.{instance.number}", instance.state == "down"
    for address, own in zip((instance.address_v4, instance.address_v6), _own_ips(instance), strict=True):
        if address is not None and address not in hosts:
            hosts[address] = Host(address, instance.node, instance.port, own, local, owner, is_down)


def _add_backends(found: dict[IPAddress, _Behind], job: str, instance: Instance) -> None:
    balanced = instance.weight if instance.state == "up" else 0
    for service_ip in instance.service_ips:
        is_own = service_ip.is_instance
        weight = 1 if is_own else balanced  # an instance's own address is its alone, whatever its state
        for address, target in ((service_ip.v4, instance.address_v4), (service_ip.v6, instance.address_v6)):
            if address is None or target is None:
                continue
            if (behind := found.get(address)) is None:
                behind = found[address] = _Behind(job, service_ip)
            if behind.job == job and not (is_own and behind.targets):
                behind.targets.append(target)
                behind.weights.append(weight)


def to_json(results: Iterable[TableQueryResult]) -> list[dict[str, Any]]:
    """The results as the wire has them."""
    return [result.model_dump(mode="json", by_alias=True, exclude_none=True) for result in results]
