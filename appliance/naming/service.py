"""A service as names see it: immutable values, and their form on the channel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from socket import getservbyport
from typing import Any, Final

from appliance.cluster.messages import Instance, ServiceIp, TableQueryResult

DEFAULT_POLICY: Final = "rr"
TXT_MAX: Final = 255
"""Bytes of one string of a TXT record (RFC 1035 section 3.3.14)."""
_PORT_NAME: Final = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
"""RFC 6335 section 5.1."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """One address of each family, or of one."""

    v4: IPv4Address | None = None
    v6: IPv6Address | None = None

    def __iter__(self) -> Any:
        return (it for it in (self.v4, self.v6) if it is not None)


@dataclass(frozen=True, slots=True)
class Member:
    """An instance: its instance IPs, and whether packets can be sent to it."""

    addresses: Addresses
    up: bool


@dataclass(frozen=True, slots=True)
class Port:
    """A port that the service exposes; ``name`` as RFC 6335 has service names."""

    number: int
    protocol: str
    name: str


@dataclass(frozen=True, slots=True)
class Service:
    """One job. ``policies`` are ServiceIPs by the policy that chooses behind them."""

    job: str
    default: str
    policies: Mapping[str, Addresses]
    members: Mapping[int, Member]
    ports: tuple[Port, ...] = ()
    metadata: tuple[str, ...] = ()

    @property
    def up(self) -> bool:
        """Whether any instance is."""
        return any(member.up for member in self.members.values())

    def to_wire(self) -> dict[str, Any]:
        """Plain data for the channel."""
        return {
            "job": self.job,
            "default": self.default,
            "policies": {name: _texts(it) for name, it in self.policies.items()},
            "members": [[number, *_texts(it.addresses), it.up] for number, it in self.members.items()],
            "ports": [[it.number, it.protocol, it.name] for it in self.ports],
            "metadata": list(self.metadata),
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Service:
        """The inverse of ``to_wire``."""
        return cls(
            data["job"],
            data["default"],
            {name: _addresses(*it) for name, it in data["policies"].items()},
            {number: Member(_addresses(v4, v6), up) for number, v4, v6, up in data["members"]},
            tuple(Port(*it) for it in data["ports"]),
            tuple(data["metadata"]),
        )


def _texts(addresses: Addresses) -> list[str | None]:
    return [str(it) if it is not None else None for it in (addresses.v4, addresses.v6)]


def _addresses(v4: str | None, v6: str | None) -> Addresses:
    return Addresses(IPv4Address(v4) if v4 else None, IPv6Address(v6) if v6 else None)


def describe(result: TableQueryResult) -> Service:
    """What the cluster says about a job, as names see it. An address that it gives twice keeps its first meaning."""
    policies: dict[str, Addresses] = {}
    members: dict[int, Member] = {}
    for service_ip in result.service_ips:
        policies.setdefault(service_ip.type.lower(), _both(service_ip))
    for instance in sorted(result.instances, key=lambda it: it.number):
        for service_ip in instance.service_ips:
            if not service_ip.is_instance:
                policies.setdefault(service_ip.type.lower(), _both(service_ip))
        members[instance.number] = Member(_own(instance), instance.is_deployed)
    default = (result.default_policy or DEFAULT_POLICY).lower()
    if default not in policies:
        default = min(policies, default=default)
    ports = tuple(Port(it.port, it.protocol, port_name(it.port, it.protocol, it.name)) for it in result.ports)
    return Service(result.job, default, policies, members, ports, tuple(_strings(result.metadata)))


def port_name(number: int, protocol: str, name: str = "") -> str:
    """The service name of a port: its own, the well-known one, or ``p8080``."""
    if _PORT_NAME.fullmatch(name.lower()):
        return name.lower()
    try:
        known = getservbyport(number, protocol)
    except OSError:
        return f"p{number}"
    return known if _PORT_NAME.fullmatch(known) else f"p{number}"


def _both(service_ip: ServiceIp) -> Addresses:
    return Addresses(service_ip.v4, service_ip.v6)


def _own(instance: Instance) -> Addresses:
    """The instance IPs: of each family the last one listed, as existing nodes take it."""
    v4, v6 = None, None
    for service_ip in instance.service_ips:
        if service_ip.is_instance:
            v4, v6 = service_ip.v4 or v4, service_ip.v6 or v6
    return Addresses(v4, v6)


def _strings(metadata: Mapping[str, str]) -> Iterable[str]:
    """``key=value`` (RFC 6763 section 6.3); what no TXT record can hold is left out."""
    lines = (f"{key}={value}" for key, value in metadata.items())
    return (line for line in lines if len(line.encode()) <= TXT_MAX)
