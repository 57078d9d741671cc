"""What a node knows (World) and what it did with one input (Outcome).

The words that the oracle, the compiled path and the fixtures share. Addresses are text in their canonical
spelling (RFC 5952).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

Address = IPv4Address | IPv6Address

ROUND_ROBIN, INSTANCE, CLOSEST, LEAST_FLOWS, MAGLEV = "rr", "instance", "closest", "least-flows", "maglev"

MALFORMED = "malformed"
FRAGMENT = "fragment"
UNSUPPORTED_PROTOCOL = "unsupported-protocol"
SPOOFED_SOURCE = "spoofed-source"
NO_ROUTE = "no-route"
UNKNOWN_SERVICE = "unknown-service"
NO_INSTANCE = "no-instance"
REVERSE_IN_USE = "reverse-in-use"
NOT_LOCAL = "not-local"
FRAGMENT_TIMEOUT = "fragment-timeout"
UNKNOWN_PEER = "unknown-peer"
PEER_SPOOF = "peer-spoof"
NESTED_OVERLAY = "nested-overlay"
ICMP_NO_FLOW = "icmp-no-flow"
TOO_BIG = "too-big"

KNOWN, ANY, OFF = "known", "any", "off"  # World.learn_hosts


@dataclass(frozen=True)
class Host:
    """A container on the overlay: its namespace address, its node, its instance IP of the same family."""

    address: str
    node: str
    port: int
    instance_ip: str | None = None


@dataclass(frozen=True)
class Service:
    """A ServiceIP and the namespace addresses behind it, in order; an instance IP has a single one.

    Weights are one a backend, or none for all alike. `near`: how many of the backends, from the first on, CLOSEST
    chooses among. `sticky`: seconds. `hash_port`: for MAGLEV a client is an address and port.
    """

    address: str
    policy: str = ROUND_ROBIN
    backends: list[str] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    near: int = 0
    sticky: int = 0
    hash_port: bool = False


@dataclass(frozen=True)
class Node:
    """A node of ours, and the largest IP packet that the underlay takes to it; 0: any."""

    address: str
    port: int
    mtu: int = 0


@dataclass(frozen=True)
class World:
    """One node: where peers send to, its host and service tables, the ranges of ServiceIPs and of the overlay.

    ``nodes`` are those that run this appliance too; the nodes of hosts are known without being in it. ``gateways``: the
    node's own addresses in the overlay.
    """

    node: str
    port: int
    hosts: list[Host] = field(default_factory=list)
    services: list[Service] = field(default_factory=list)
    service_ranges: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    gateways: list[str] = field(default_factory=list)
    overlay: list[str] = field(default_factory=lambda: ["10.16.0.0/12", "fc00::/7"])
    learn_hosts: str = "known"


@dataclass
class Outcome:
    """What came of one input: datagrams as (ip, port, payload), TUN writes as (virtio header, packet)."""

    wire: list[tuple[str, int, bytes]] = field(default_factory=list)
    tun: list[tuple[bytes, bytes]] = field(default_factory=list)
    drops: dict[str, int] = field(default_factory=dict)
