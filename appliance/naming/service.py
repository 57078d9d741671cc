"""A service as names see it: immutable values, and their form on the channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any


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
