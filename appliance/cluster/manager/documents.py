"""What the key-value bucket holds: one JSON document a key.

| key | document |
|---|---|
| ``node.<id>`` | a node: its subnets, whether it is there |
| ``job.<job name>`` | a service: its ServiceIPs by policy |
| ``instance.<job name>.<number>`` | an instance: its instance IPs, and where it runs |
| ``interest.<node id>.<job name>`` | that a node follows a job |
| ``pool.subnets``, ``pool.services`` | where the next search for a free one begins |

All are in one bucket, because a transaction does not span two.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from appliance.config import IPAddress

SUBNETS = "pool.subnets"
SERVICES = "pool.services"


class DocumentError(ValueError):
    """A stored value that cannot be read; the text names its key. Guessing could give a subnet twice."""


class Document(BaseModel):
    """A value as it is stored. Fields that a later version adds are ignored by an earlier one."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Node(Document):
    """One node. `online` is None if it never said: existing nodes have no status, and count as there."""

    subnet_v4: IPv4Network | None = None
    subnet_v6: IPv6Network | None = None
    online: bool | None = None
    host: IPv4Address | IPv6Address | None = None
    port: int = 0
    """Where it is reached, as it says itself. Existing nodes say it of their instances only."""
    status_at: int = 0
    """Number of the last status message that was taken into account."""
    lost_at: int = 0
    """Number of the message that told of its loss: what it announced before counts no more."""


class ServiceIp(Document):
    """One ServiceIP of a job."""

    policy: str
    v4: IPv4Address | None = None
    v6: IPv6Address | None = None
    sticky: int = 0
    hash_port: bool = False

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """Those that it has."""
        return tuple(it for it in (self.v4, self.v6) if it is not None)


class ExposedPort(Document):
    """A port on which every instance serves."""

    port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    name: str = ""


class Exposure(Document):
    """A port of nodes that leads to a service; ``descriptor`` says what the fields mean."""

    port: int
    to: int | None = None
    protocol: Literal["tcp", "udp"] = "tcp"
    address: IPv4Address | IPv6Address | None = None
    nodes: Literal["all", "hosting"] | tuple[str, ...] = "all"
    policy: str = ""
    prefer: Literal["policy", "local"] = "policy"


class Http(Document):
    """What is asked for."""

    port: int
    path: str = "/"


class Health(Document):
    """How the hosting node checks an instance."""

    tcp: int | None = None
    http: Http | None = None
    command: tuple[str, ...] = ()
    interval: float = 5.0
    timeout: float = 2.0
    rise: int = 1
    fall: int = 3
    panic: int = 50


class Names(Document):
    """What nodes are told of a service beside its addresses: what its names say, the jobs that its instances are going
    to call, the ports that nodes open for it, how it is checked."""

    default_policy: str = ""
    ports: tuple[ExposedPort, ...] = ()
    metadata: dict[str, str] = {}
    needs: tuple[str, ...] = ()
    exposed: tuple[Exposure, ...] = ()
    health: Health | None = None


class Job(Document):
    """One service. How many instances it has is what instance documents there are."""

    service_ips: tuple[ServiceIp, ...] = ()
    names: Names = Names()
    drain: float = 0.0
    """Seconds for which instances that are not wanted any more keep their connections."""
    leaving: bool = False
    """Whether it goes with the last of its instances."""


class Placement(Document):
    """Where an instance runs, as its node announced it."""

    node: str
    address_v4: IPv4Address | None = None
    address_v6: IPv6Address | None = None
    host: IPv4Address | IPv6Address
    port: int


class Instance(Document):
    """One instance. `announced_at` numbers the last message that placed or removed it."""

    v4: IPv4Address
    v6: IPv6Address
    placement: Placement | None = None
    announced_at: int = 0
    weight: int = 1
    state: Literal["up", "draining", "down"] = "up"
    healthy: bool | None = None
    """As its node found; None: not yet."""
    checked_at: int = 0
    """Number of the message that said so."""
    leaving_s: float = 0.0
    """Seconds for which it drains before it is removed; 0: it stays."""


class Interest(Document):
    """That a node follows a job; the key says which."""


class Pool(Document):
    """Numbers in the address plan's spaces, by name, at which the next search begins."""

    cursors: dict[str, int] = {}


KINDS: dict[str, type[Document]] = {"node": Node, "job": Job, "instance": Instance, "interest": Interest, "pool": Pool}


def node_key(node: str) -> str:
    """The key of a node."""
    return f"node.{node}"


def job_key(job: str) -> str:
    """The key of a job."""
    return f"job.{job}"


def instance_key(job: str, number: int) -> str:
    """The key of an instance."""
    return f"instance.{job}.{number}"


def interest_key(node: str, job: str) -> str:
    """The key of a node's interest in a job."""
    return f"interest.{node}.{job}"


def encode(document: Document) -> bytes:
    """A document as stored."""
    return document.model_dump_json(exclude_defaults=True).encode()


def decode(key: str, value: bytes) -> Document | None:
    """The document of a key; None for a kind that this version does not know. Raises DocumentError."""
    kind = KINDS.get(key.split(".", 1)[0])
    try:
        return kind.model_validate_json(value) if kind else None
    except ValidationError as error:
        raise DocumentError(f"{key}: expected a {key.split('.', 1)[0]}: {error.errors()[0]['msg']}") from error
