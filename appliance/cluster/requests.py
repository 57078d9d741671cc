"""What a node says to its cluster: topic's last part and payload of each message.

Existing managers read these with their own names and types: ``host_port`` is a string here and a number in answers,
and a job is ``appname``, ``sname`` or ``app_name``. A missing address is an empty string.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from appliance.cluster import topics
from appliance.tables.layout import IPAddress


@dataclass(frozen=True)
class Deployment:
    """An instance that runs on this node."""

    job: str
    number: int
    v4: IPv4Address | None
    v6: IPv6Address | None


@dataclass(frozen=True)
class Endpoint:
    """Where the other nodes reach this one."""

    address: IPAddress
    port: int


Request = tuple[str, bytes]


def subnet() -> Request:
    """Asks for the node's subnets."""
    return topics.SUBNET, _encode({"METHOD": "GET"})


def query(key: str, *, is_address: bool) -> Request:
    """Asks for a job's instances, by its name or by an address of it in canonical text."""
    return topics.QUERY, _encode({"sname": "" if is_address else key, "sip": key if is_address else ""})


def interest_remove(job: str) -> Request:
    """Says that notices about a job are not needed any more."""
    return topics.INTEREST_REMOVE, _encode({"appname": job})


def deployed(deployment: Deployment, here: Endpoint) -> Request:
    """Says that an instance runs here."""
    return topics.DEPLOYED, _service("DEPLOYED", deployment, here, _text(deployment.v4), _text(deployment.v6))


def undeployed(deployment: Deployment, here: Endpoint) -> Request:
    """Says that an instance runs here no more."""
    return topics.UNDEPLOYED, _service("UNDEPLOYED", deployment, here, _text(deployment.v4), _text(deployment.v6))


def address_changed(deployment: Deployment, here: Endpoint) -> Request:
    """Says that the node of an instance is reached elsewhere from now on."""
    return topics.ADDRESS_CHANGED, _service("", deployment, here, "", "")


def health(job: str, number: int, *, is_good: bool) -> Request:
    """Says whether an instance here works."""
    return topics.HEALTH, _encode({"appname": job, "instance_number": number, "healthy": is_good})


def status(here: Endpoint | None) -> Request:
    """Says that the node is there, and where it is reached; None: that it is not."""
    if here is None:
        return topics.STATUS, _encode({"status": "offline"})
    return topics.STATUS, _encode({"status": "online", "host_ip": str(here.address), "host_port": str(here.port)})


def _service(status: str, deployment: Deployment, here: Endpoint, v4: str, v6: str) -> bytes:
    return _encode(
        {
            "appname": deployment.job,
            "status": status,
            "instance_number": deployment.number,
            "nsip": v4,
            "nsipv6": v6,
            "host_port": str(here.port),
            "host_ip": str(here.address),
        }
    )


def _text(address: IPAddress | None) -> str:
    return "" if address is None else str(address)


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()
