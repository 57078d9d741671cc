"""What the supervisor knows of a job, in the form that names have it. Not imported by the resolver, which is small."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from socket import getservbyport
from typing import Final

from appliance.cluster.messages import Instance, ServiceIp, TableQueryResult
from appliance.naming.service import Addresses, Member, Port, Service

DEFAULT_POLICY: Final = "rr"
TXT_MAX: Final = 255
"""Bytes of one string of a TXT record (RFC 1035 section 3.3.14)."""
_PORT_NAME: Final = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
"""RFC 6335 section 5.1."""


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
