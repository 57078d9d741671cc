"""The tables that the fixtures share: three nodes, seen from node A.

    node A 192.0.2.1:50103        node B 192.0.2.2:50103       node C [2001:db8::3]:50104
      ALICE   10.18.0.2  fc00::2    BOB    10.18.0.66 fc00::102  CAROL  10.18.0.130 fc00::202
      ANN     10.18.0.3  fc00::3    BRIEF  10.18.0.67 fc00::103
      ADAM    10.18.0.4  fc00::4
    ADAM and BRIEF have no instance IP.

Every ServiceIP is a pair (IPv4, IPv6), as is every container: index one with FOUR or SIX.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.oracle.model import Host, Node, Service, World

FOUR, SIX = 0, 1
FAMILIES = (FOUR, SIX)
Pair = tuple[str, str]

NODE_A = ("192.0.2.1", 50103)
NODE_B = ("192.0.2.2", 50103)
NODE_C = ("2001:db8::3", 50104)


@dataclass(frozen=True)
class Container:
    """A container: its node, its namespace addresses and its instance IPs."""

    node: tuple[str, int]
    ns: Pair
    instance: Pair | None = None

    @property
    def name(self) -> Pair:
        """The addresses under which other nodes see it."""
        return self.instance or self.ns

    def hosts(self) -> list[Host]:
        """Its entries in the host table, one a family."""
        return [Host(self.ns[f], *self.node, self.instance[f] if self.instance else None) for f in FAMILIES]

    def services(self) -> list[Service]:
        """Its instance IPs in the service table, each with one backend."""
        return [Service(self.instance[f], "instance", [self.ns[f]]) for f in FAMILIES] if self.instance else []


ALICE = Container(NODE_A, ("10.18.0.2", "fc00::2"), ("10.30.0.1", "fdff::1"))
ANN = Container(NODE_A, ("10.18.0.3", "fc00::3"), ("10.30.0.4", "fdff::4"))
ADAM = Container(NODE_A, ("10.18.0.4", "fc00::4"))
BOB = Container(NODE_B, ("10.18.0.66", "fc00::102"), ("10.30.0.2", "fdff::2"))
BRIEF = Container(NODE_B, ("10.18.0.67", "fc00::103"))
CAROL = Container(NODE_C, ("10.18.0.130", "fc00::202"), ("10.30.0.3", "fdff::3"))
CONTAINERS = (ALICE, ANN, ADAM, BOB, BRIEF, CAROL)

GATEWAY: Pair = ("10.18.0.1", "fc00::1")  # node A's own addresses in the overlay
STRANGER: Pair = ("10.18.9.9", "fc00::909")  # an address of no container
OUTSIDE: Pair = ("198.51.100.9", "2001:db8:9::9")  # neither overlay nor ServiceIP
UNKNOWN: Pair = ("10.30.77.77", "fdff:2000::77")  # in the ServiceIP range, in no table

AWAY: Pair = ("10.30.30.1", "fdff:2000::1")  # BOB
BOTH: Pair = ("10.30.30.2", "fdff:2000::2")  # BOB, then CAROL
NEAR: Pair = ("10.30.30.3", "fdff:2000::3")  # ANN, on this node
SELF: Pair = ("10.30.30.4", "fdff:2000::4")  # ALICE
NAMELESS: Pair = ("10.30.30.5", "fdff:2000::5")  # BRIEF
EMPTY: Pair = ("10.30.30.6", "fdff:2000::6")  # nobody
GHOST: Pair = ("10.30.30.7", "fdff:2000::7")  # STRANGER
HALF: Pair = ("10.30.30.8", "fdff:2000::8")  # STRANGER, then BOB
AGAIN: Pair = ("10.30.30.9", "fdff:2000::9")  # BOB: another name for what AWAY means

BACKENDS: dict[Pair, list[Pair]] = {
    AWAY: [BOB.ns],
    BOTH: [BOB.ns, CAROL.ns],
    NEAR: [ANN.ns],
    SELF: [ALICE.ns],
    NAMELESS: [BRIEF.ns],
    EMPTY: [],
    GHOST: [STRANGER],
    HALF: [STRANGER, BOB.ns],
    AGAIN: [BOB.ns],
}

WORLD = World(
    *NODE_A,
    hosts=[host for container in CONTAINERS for host in container.hosts()],
    services=[
        *(service for container in CONTAINERS for service in container.services()),
        *(Service(pair[f], backends=[b[f] for b in backends]) for pair, backends in BACKENDS.items() for f in FAMILIES),
    ],
    service_ranges=["10.30.0.0/16", "fdff::/16"],
    nodes=[Node(*NODE_B), Node(*NODE_C)],
    gateways=list(GATEWAY),
)
