"""The address plan: which subnets nodes get, which addresses services and instances get.

A `Space` is a sequence of equal units (subnets, or single addresses) in one or more ranges. `Space.free` walks it from
a cursor that only moves on, so that a unit which was given back is the last to be given again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from itertools import combinations

from appliance.config import IPAddress, IPNetwork, overlap

TRIES_MAX = 1 << 20
"""Units that are looked at before a space counts as exhausted: more than any version 4 space here has."""
OCTET_MAX = 253
"""Existing clusters give no address whose third or fourth octet is 254 or 255, and nor do we."""


class ExhaustedError(Exception):
    """A space has no unit left; the text names it and the setting that makes it larger."""


class PlanError(ValueError):
    """A plan that contradicts itself; the text names the setting."""


@dataclass(frozen=True)
class Space:
    """Units of one prefix length in ranges, by number."""

    name: str
    ranges: tuple[IPNetwork, ...]
    unit: int

    def __post_init__(self) -> None:
        for one in self.ranges:
            if one.prefixlen > self.unit:
                raise PlanError(f"{self.name}: expected ranges of /{self.unit} or larger, got {one}")

    @property
    def size(self) -> int:
        """How many units there are."""
        return sum(self._units(one) for one in self.ranges)

    def __getitem__(self, number: int) -> IPNetwork:
        """The unit with a number below `size`."""
        for one in self.ranges:
            if number < self._units(one):
                start = int(one.network_address) + (number << (one.max_prefixlen - self.unit))
                return type(one)((start, self.unit))
            number -= self._units(one)
        raise IndexError(number)

    def __contains__(self, address: object) -> bool:
        """Whether an address lies in one of the ranges."""
        return any(address in one for one in self.ranges)

    def free(self, cursor: int, taken: Callable[[IPNetwork], bool]) -> tuple[IPNetwork, int]:
        """The first unit from a cursor on that is not taken, and the next cursor. Raises ExhaustedError."""
        for number in self._round(cursor):
            unit = self[number]
            if is_usable(unit) and not taken(unit):
                return unit, number + 1
        raise ExhaustedError(f"{self.name}: expected a free one of {self.size} in {', '.join(map(str, self.ranges))}")

    def _units(self, one: IPNetwork) -> int:
        return 1 << (self.unit - one.prefixlen)

    def _round(self, cursor: int) -> Iterator[int]:
        return ((cursor + step) % self.size for step in range(min(self.size, TRIES_MAX)))


def is_usable(unit: IPNetwork) -> bool:
    """Whether a unit may be given: a subnet always, a single version 4 address by its octets."""
    address = unit.network_address
    if not isinstance(address, IPv4Address) or unit.prefixlen < unit.max_prefixlen:
        return True
    return max(address.packed[2:]) <= OCTET_MAX


def _v4(*ranges: str) -> tuple[IPv4Network, ...]:
    return tuple(IPv4Network(one) for one in ranges)


def _v6(*ranges: str) -> tuple[IPv6Network, ...]:
    return tuple(IPv6Network(one) for one in ranges)


@dataclass(frozen=True)
class Plan:
    """All spaces of a cluster. The defaults are those of existing clusters, so that both can share nodes."""

    subnets_v4: tuple[IPv4Network, ...] = field(
        default_factory=lambda: _v4("10.18.0.0/15", "10.20.0.0/14", "10.24.0.0/14", "10.28.0.0/15")
    )
    subnets_v6: tuple[IPv6Network, ...] = field(default_factory=lambda: _v6("fc00::/8"))
    prefix_v4: int = 26
    prefix_v6: int = 120
    services_v4: tuple[IPv4Network, ...] = field(default_factory=lambda: _v4("10.30.0.0/16"))
    instances_v6: tuple[IPv6Network, ...] = field(default_factory=lambda: _v6("fdff::/21", "fdff:800::/21"))
    rr_v6: tuple[IPv6Network, ...] = field(default_factory=lambda: _v6("fdff:2000::/21"))
    closest_v6: tuple[IPv6Network, ...] = field(default_factory=lambda: _v6("fdff:1000::/21"))
    least_flows_v6: tuple[IPv6Network, ...] = field(default_factory=lambda: _v6("fdff:5000::/21"))
    maglev_v6: tuple[IPv6Network, ...] = field(default_factory=lambda: _v6("fdff:6000::/21"))

    def __post_init__(self) -> None:
        balanced = (self.service_v6(policy) for policy in self._balanced)
        spaces = (self.node_v4, self.node_v6, self.service_v4, self.instance_v6, *balanced)
        for (name, one), (other_name, other) in combinations(((s.name, r) for s in spaces for r in s.ranges), 2):
            if overlap(one, other):
                raise PlanError(f"{name}: expected ranges that do not overlap {other_name} ({other}), got {one}")

    @property
    def node_v4(self) -> Space:
        """Nodes' version 4 subnets."""
        return Space("subnets-v4", self.subnets_v4, self.prefix_v4)

    @property
    def node_v6(self) -> Space:
        """Nodes' version 6 subnets."""
        return Space("subnets-v6", self.subnets_v6, self.prefix_v6)

    @property
    def service_v4(self) -> Space:
        """Version 4 ServiceIPs of every policy, and instance IPs."""
        return Space("services-v4", self.services_v4, 32)

    @property
    def instance_v6(self) -> Space:
        """Version 6 instance IPs."""
        return Space("instances-v6", self.instances_v6, 128)

    def service_v6(self, policy: str) -> Space:
        """Version 6 ServiceIPs of one policy. Raises KeyError for an unknown one."""
        return Space(f"{policy}-v6", self._balanced[policy], 128)

    @property
    def _balanced(self) -> dict[str, tuple[IPv6Network, ...]]:
        return {
            "rr": self.rr_v6,
            "closest": self.closest_v6,
            "least-flows": self.least_flows_v6,
            "maglev": self.maglev_v6,
        }


def unit_of(address: IPAddress) -> IPNetwork:
    """The network that holds one address alone."""
    return ip_network(address)
