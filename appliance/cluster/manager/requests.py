"""What nodes ask and announce: MQTT payloads as values.

Payloads come from whoever may publish, so nothing in them is believed before it is checked, and a wrong one is a
`RequestError` that names topic and field. Existing NetManagers send a port as a string, ``<nil>`` as an address that
they lack, and no address at all where it does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from appliance.config import IPAddress

NODE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Existing clusters use 24 hexadecimal digits; all that is needed is that it can be part of a key."""
JOB = re.compile(r"[A-Za-z0-9]{1,30}(\.[A-Za-z0-9]{1,30}){3}")
"""``app.appns.service.servicens``; existing NetManagers take no other characters, and no longer parts."""
PAYLOAD_SHOWN = 80
"""Bytes of a wrong payload that the error repeats."""
ABSENT = frozenset({"", "<nil>", None})


class RequestError(ValueError):
    """A message that does not say what it should; the text names the topic, the field, and what was expected."""


def _address_or_none(value: object) -> object:
    return None if value in ABSENT else value


def _job(value: object) -> object:
    if not isinstance(value, str) or not JOB.fullmatch(value):
        raise ValueError("expected app.namespace.service.namespace, each of 1 to 30 letters and digits")
    return value


class _Payload(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


JobName = Annotated[str, BeforeValidator(_job)]
Number = Annotated[int, Field(ge=0)]


class _Subnet(_Payload):
    method: str = Field(alias="METHOD")


class _Instance(_Payload):
    job: JobName = Field(alias="appname")
    number: Number = Field(alias="instance_number")


class _Deployed(_Instance):
    v4: Annotated[IPv4Address | None, BeforeValidator(_address_or_none)] = Field(None, alias="nsip")
    v6: Annotated[IPv6Address | None, BeforeValidator(_address_or_none)] = Field(None, alias="nsipv6")
    host: IPv4Address | IPv6Address = Field(alias="host_ip")
    port: int = Field(alias="host_port", ge=1, le=65535)


class _Health(_Instance):
    healthy: bool


class _Moved(_Payload):
    host: IPv4Address | IPv6Address = Field(alias="host_ip")
    port: int = Field(alias="host_port", ge=1, le=65535)


class _Query(_Payload):
    name: str = Field("", alias="sname")
    address: str = Field("", alias="sip")


class _Remove(_Payload):
    name: str = Field(alias="appname")


class _Status(_Payload):
    status: Annotated[str, Field(pattern="^(online|offline)$")]
    host: IPv4Address | IPv6Address | None = Field(None, alias="host_ip")
    port: int = Field(0, alias="host_port", ge=0, le=65535)


@dataclass(frozen=True)
class SubnetWanted:
    """A node asks for its subnets."""


@dataclass(frozen=True)
class Deployed:
    """A node says that an instance runs on it."""

    job: str
    number: int
    v4: IPv4Address | None
    v6: IPv6Address | None
    host: IPAddress
    port: int


@dataclass(frozen=True)
class Undeployed:
    """A node says that an instance runs on it no more."""

    job: str
    number: int


@dataclass(frozen=True)
class Checked:
    """A node says whether an instance on it works."""

    job: str
    number: int
    healthy: bool


@dataclass(frozen=True)
class AddressChanged:
    """A node says where its tunnel ends from now on. Address and port are the node's, whatever job it names."""

    host: IPAddress
    port: int


@dataclass(frozen=True)
class TableQuery:
    """A node asks for a job, by name or by one of its addresses. `key` is what it asked, to the byte."""

    key: str
    address: IPAddress | None
    """None if asked by name, or by something that is no address."""
    by_name: bool


@dataclass(frozen=True)
class InterestRemoved:
    """A node follows a job no more. Existing nodes also send addresses, which mean nothing."""

    job: str


@dataclass(frozen=True)
class StatusChanged:
    """A node is there, or its last will says that it is gone. ``host``: where it is reached, if it says so."""

    online: bool
    host: IPAddress | None = None
    port: int = 0


Request = (
    SubnetWanted | Deployed | Undeployed | Checked | AddressChanged | TableQuery | InterestRemoved | StatusChanged
)


def parse(topic: str, payload: bytes) -> tuple[str, Request | None]:
    """The node and its request; None for a request that asks nothing of us. Raises RequestError."""
    root, node, net, kind = topic.split("/", 3)
    if (root, net) != ("nodes", "net") or kind not in _READERS:
        raise RequestError(f"{topic}: expected one of nodes/<id>/net/{{{','.join(_READERS)}}}")
    if not NODE_ID.fullmatch(node):
        raise RequestError(f"{topic}: expected a node id of 1 to 64 letters, digits, - and _")
    try:
        return node, _READERS[kind](payload)
    except ValidationError as error:
        raise RequestError(f"{topic}: {_sentence(error)}; got {_shown(payload)}") from error


def _subnet(payload: bytes) -> Request | None:
    """A lease is not given back by its node: it would lose its containers' addresses by mistake."""
    return SubnetWanted() if _Subnet.model_validate_json(payload).method == "GET" else None


def _deployed(payload: bytes) -> Request:
    it = _Deployed.model_validate_json(payload)
    return Deployed(it.job, it.number, it.v4, it.v6, it.host, it.port)


def _undeployed(payload: bytes) -> Request:
    it = _Instance.model_validate_json(payload)
    return Undeployed(it.job, it.number)


def _checked(payload: bytes) -> Request:
    it = _Health.model_validate_json(payload)
    return Checked(it.job, it.number, it.healthy)


def _moved(payload: bytes) -> Request:
    it = _Moved.model_validate_json(payload)
    return AddressChanged(it.host, it.port)


def _query(payload: bytes) -> Request:
    it = _Query.model_validate_json(payload)
    if bool(it.name) == bool(it.address):
        raise RequestError(f"sname, sip: expected exactly one of them; got {_shown(payload)}")
    return TableQuery(it.name or it.address, canonical(it.address), bool(it.name))


def _remove(payload: bytes) -> Request:
    return InterestRemoved(_Remove.model_validate_json(payload).name)


def _status(payload: bytes) -> Request:
    it = _Status.model_validate_json(payload)
    if it.host is not None and not it.port:
        raise RequestError(f"host_port: expected a port, as there is a host_ip; got {_shown(payload)}")
    return StatusChanged(it.status == "online", it.host, it.port)


_READERS: dict[str, Callable[[bytes], Request | None]] = {
    "subnet": _subnet,
    "service/deployed": _deployed,
    "service/undeployed": _undeployed,
    "service/health": _checked,
    "service/address-changed": _moved,
    "tablequery/request": _query,
    "interest/remove": _remove,
    "status": _status,
}


def canonical(text: str) -> IPAddress | None:
    """The address that a text spells, however it spells it; None if it is none."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def _sentence(error: ValidationError) -> str:
    details: Any = error.errors()[0]
    where = ".".join(str(part) for part in details["loc"]) or "payload"
    return f"{where}: {details['msg']}"


def _shown(payload: bytes) -> str:
    return repr(payload[:PAYLOAD_SHOWN])
