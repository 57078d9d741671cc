"""What has to change: wanted against actual, in; commands, out. Pure.

A command changes one thing and names everything it needs, so that a list of them can be read, asserted
on, and carried out one by one. Between any two of them the process may be killed: what is then there is
again an `Actual`, and the next plan starts from it. Two orders make that work.

- A link of ours is marked as ours by the very command that makes it (its group), so that nothing of ours
  is ever without an owner.
- A container's link gets its record (`attachment.Record`, the alias) by the last command, so that a link
  with a record is complete, and one without is to be removed.

Nothing is planned that is already as wanted: a second plan of the same is empty.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from ipaddress import IPv4Interface
from typing import Final

from appliance import limits
from appliance.environment import guard, names
from appliance.environment.addresses import IPAddress, IPInterface, IPNetwork, default_route
from appliance.environment.attachment import Record
from appliance.environment.errors import EnvironmentError_

LINK_GROUP: Final = 234
"""The group (`ip link show group 234`) of every link that we made."""
ROUTE_PROTOCOL: Final = 234
"""The protocol (`ip route show proto 234`) of every route that we made; unassigned in rt_protos."""
TCP_HEADERS: Final = 52
"""IPv4, TCP and its timestamps: what a full segment carries beside payload, bytes."""
TCP_ROOM: Final = 400
"""More than MAX_TCP_HEADER (include/net/tcp.h), less than MAX_TCP_HEADER and a segment, bytes."""


class Place(StrEnum):
    """The namespace that a command is carried out in."""

    NODE = "node"
    CONTAINER = "container"


# --- Commands -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreateBridge:
    """A bridge with a hardware address of its own, down. Its MTU is set later: see `_bridge`."""

    link: str
    mac: str


@dataclass(frozen=True, slots=True)
class CreateVeth:
    """A container's link: the node's end a port of the bridge, the other end inside; both down."""

    link: str
    bridge: str
    peer: str
    mac: str
    mtu: int


@dataclass(frozen=True, slots=True)
class DeleteLink:
    """Removes a link of the node, and with it its other end, addresses and routes. Absent: no error."""

    link: str


@dataclass(frozen=True, slots=True)
class SetMtu:
    """Bytes of the largest packet."""

    place: Place
    link: str
    mtu: int


@dataclass(frozen=True, slots=True)
class SetTxQueueLength:
    """Packets that a device's queue holds."""

    link: str
    packets: int


@dataclass(frozen=True, slots=True)
class SetMaster:
    """Makes a link a port of a bridge."""

    link: str
    bridge: str


@dataclass(frozen=True, slots=True)
class SetUp:
    """Switches a link on."""

    place: Place
    link: str


@dataclass(frozen=True, slots=True)
class AwaitCarrier:
    """Waits until a link that is up, as its other end is, passes packets. The kernel sees to that a little later, by
    itself (net/core/link_watch.c): until then a bridge drops what is for this port, and the link what is sent."""

    place: Place
    link: str


@dataclass(frozen=True, slots=True)
class EnableGro:
    """Joins segments that arrive on a link: a container without offloads then costs a fifth."""

    link: str


@dataclass(frozen=True, slots=True)
class Guard:
    """Has a container's link take nothing but frames of these addresses, IPv4 first (`guard`); in place of what guards
    it now."""

    link: str
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class SetRecord:
    """Commits an attachment."""

    link: str
    record: str


@dataclass(frozen=True, slots=True)
class AddAddress:
    """An address that is usable at once: without duplicate address detection."""

    place: Place
    link: str
    interface: IPInterface


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """Takes an address off a link of the node."""

    link: str
    interface: IPInterface


@dataclass(frozen=True, slots=True)
class AddRoute:
    """A route out of a link, through a gateway or, without one, straight."""

    place: Place
    link: str
    destination: IPNetwork
    gateway: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class RemoveRoute:
    """Removes a route of ours from the node."""

    link: str
    destination: IPNetwork


@dataclass(frozen=True, slots=True)
class SetSysctl:
    """Writes a value below /proc/sys of a namespace."""

    place: Place
    path: str
    value: str


Command = (
    CreateBridge
    | CreateVeth
    | DeleteLink
    | SetMtu
    | SetTxQueueLength
    | SetMaster
    | SetUp
    | AwaitCarrier
    | EnableGro
    | Guard
    | SetRecord
    | AddAddress
    | RemoveAddress
    | AddRoute
    | RemoveRoute
    | SetSysctl
)


def describe(command: Command) -> str:
    """A command in one line, as errors and logs show it: `AddRoute link=eth0 destination=…`."""
    parts = (f"{it.name}={getattr(command, it.name)}" for it in fields(command))
    return " ".join((type(command).__name__, *parts))


# --- What is wanted, what is there --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """A link as the kernel describes it. `master` and `peer` are indices, 0 for none."""

    name: str
    index: int
    kind: str = ""
    up: bool = False
    mtu: int = 0
    txqueuelen: int = 0
    mac: str = ""
    master: int = 0
    group: int = 0
    alias: str = ""
    peer: int = 0
    peer_namespace: int = -1
    carrier: bool = False  # it passes packets; of a pair's end: both ends are up, and the kernel has taken note

    @property
    def record(self) -> Record | None:
        """Of a container's link that was made to the end, its record."""
        return Record.decode(self.alias)


@dataclass(frozen=True, slots=True)
class NodeWanted:
    """The node's part of the environment. `gateways` are the bridge's own addresses."""

    bridge: str
    tun: str
    mtu: int
    txqueuelen: int
    gateways: tuple[IPInterface, ...]
    overlay: tuple[IPNetwork, ...]

    @property
    def tun_addresses(self) -> tuple[IPInterface, ...]:
        """The IPv4 gateways again, as addresses of the TUN link alone: see `_tun_sysctls`."""
        return tuple(IPv4Interface(it.ip) for it in self.gateways if isinstance(it, IPv4Interface))


@dataclass(frozen=True, slots=True)
class NodeActual:
    """What there is of it. A sysctl that is not in `sysctls` does not exist, or not yet."""

    ipv6: bool
    bridge: Link | None = None
    tun: Link | None = None
    gateways: frozenset[IPInterface] = frozenset()
    tun_addresses: frozenset[IPInterface] = frozenset()
    overlay: frozenset[IPNetwork] = frozenset()
    veths: tuple[Link, ...] = ()
    guards: Mapping[str, str] = field(default_factory=dict)  # names of filters, by link
    advertised: tuple[str, ...] = ()  # links that take router advertisements as a host does
    sysctls: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttachmentWanted:
    """A container's link. `addresses` and `gateways` go together, at most one a family."""

    veth: str
    bridge: str
    interface: str
    mac: str
    mtu: int
    addresses: tuple[IPInterface, ...]
    gateways: tuple[IPAddress, ...]
    overlay: tuple[IPNetwork, ...]
    record: str


@dataclass(frozen=True, slots=True)
class AttachmentActual:
    """What there is of it: the node's end, the container's end, and the container around it.

    `peer` is None unless the container's end is in this very container. `defaults` are the IP versions
    that have a default route through another of the container's links. `routes` are those of `peer`.
    """

    ipv6: bool
    bridge: Link | None = None
    veth: Link | None = None
    gro: bool = False
    guard: str = ""  # the filter's name
    peer: Link | None = None
    names: frozenset[str] = frozenset()
    loopback_up: bool = False
    addresses: frozenset[IPInterface] = frozenset()
    routes: frozenset[IPNetwork] = frozenset()
    defaults: frozenset[int] = frozenset()
    sysctls: Mapping[tuple[Place, str], str] = field(default_factory=dict)


# --- The node -----------------------------------------------------------------------------------

_ACCEPT_RA_WHILE_FORWARDING: Final = "2"
_FORWARDING_V4: Final = "net/ipv4/ip_forward"
FORWARDING_V6: Final = "net/ipv6/conf/all/forwarding"


def plan_node(wanted: NodeWanted, actual: NodeActual) -> list[Command]:
    """Bridge, TUN link, routes and sysctls as wanted, and complete containers' links on the bridge.

    Raises EnvironmentError_ where no command helps: no TUN link, a name in use for something else, IPv6
    wanted of a kernel without it. Half-made links are the matter of `leftovers`.
    """
    _check_node(wanted, actual)
    forwarding = _forwarding(actual)
    bridge = [*_bridge(wanted, actual), *_ports(wanted, actual)]
    return [*forwarding, *bridge, *_tun(wanted, actual)]


def node_sysctls(wanted: NodeWanted, ipv6: bool) -> tuple[str, ...]:
    """The sysctls that `plan_node` looks at."""
    return tuple(path for path, _ in _all_sysctls(wanted, ipv6))


def leftovers(actual: NodeActual, known: Collection[str]) -> list[str]:
    """Names of containers' links of ours that belong to no attachment."""
    return [link.name for link in actual.veths if link.name not in known]


def plan_removal(wanted: NodeWanted, actual: NodeActual) -> list[Command]:
    """Takes away what `plan_node` made. The TUN link is its opener's; sysctls of the whole node stay,
    as others may have come to rely on them."""
    commands: list[Command] = [DeleteLink(link.name) for link in actual.veths]
    if actual.bridge is not None and actual.bridge.group == LINK_GROUP:
        commands.append(DeleteLink(wanted.bridge))
    elif actual.bridge is not None:
        commands += [RemoveAddress(wanted.bridge, it) for it in wanted.gateways if it in actual.gateways]
    commands += [RemoveRoute(wanted.tun, it) for it in sorted(actual.overlay, key=str)]
    commands += [RemoveAddress(wanted.tun, it) for it in wanted.tun_addresses if it in actual.tun_addresses]
    return commands


def _check_node(wanted: NodeWanted, actual: NodeActual) -> None:
    if actual.tun is None or actual.tun.kind != "tun":
        found = "none" if actual.tun is None else f"a {actual.tun.kind or 'physical'} link"
        raise EnvironmentError_(f"network.tun: expected the TUN link {wanted.tun}, got {found}")
    if actual.bridge is not None and actual.bridge.kind != "bridge":
        found = f"a {actual.bridge.kind or 'physical'} link"
        raise EnvironmentError_(f"network.bridge: expected {wanted.bridge} to be a bridge, got {found}")
    if not actual.ipv6 and any(it.version == 6 for it in wanted.gateways):
        raise EnvironmentError_("network.subnet_v6: expected a kernel with IPv6, got one without")


def _forwarding(actual: NodeActual) -> Iterator[Command]:
    """A link that a router advertisement configures would lose its address and route as soon as the
    kernel becomes a router (ip-sysctl.rst, accept_ra), so it is told to go on before that."""
    if actual.ipv6 and actual.sysctls.get(FORWARDING_V6) != "1":
        for link in actual.advertised:
            path = f"net/ipv6/conf/{link}/accept_ra"
            yield SetSysctl(Place.NODE, path, _ACCEPT_RA_WHILE_FORWARDING)
    yield from _sysctls(_forwarding_sysctls(actual.ipv6), actual)


def _bridge(wanted: NodeWanted, actual: NodeActual) -> Iterator[Command]:
    """The MTU is set by a command of its own, after the bridge is made: only then does the kernel keep
    it, instead of following its ports (br_mtu_auto_adjust)."""
    there = actual.bridge
    if there is None:
        yield CreateBridge(wanted.bridge, names.bridge_mac(wanted.bridge))
    yield from _sysctls(_bridge_sysctls(wanted, actual.ipv6), actual)
    if there is None or there.mtu != wanted.mtu:
        yield SetMtu(Place.NODE, wanted.bridge, wanted.mtu)
    if there is None or not there.up:
        yield SetUp(Place.NODE, wanted.bridge)
    addresses = _addresses(wanted.bridge, wanted.gateways, actual.gateways)
    ours = there is not None and there.group == LINK_GROUP  # on another's, other addresses are theirs
    yield from (it for it in addresses if ours or isinstance(it, AddAddress))


def _ports(wanted: NodeWanted, actual: NodeActual) -> Iterator[Command]:
    """The node's ends of complete containers' links."""
    index = 0 if actual.bridge is None else actual.bridge.index
    for link in actual.veths:
        record = link.record
        if record is None:
            continue
        if actual.guards.get(link.name) != guard.name(record.addresses):
            yield Guard(link.name, record.addresses)
        if link.master == 0 or link.master != index:
            yield SetMaster(link.name, wanted.bridge)
        if link.mtu != wanted.mtu:
            yield SetMtu(Place.NODE, link.name, wanted.mtu)
        if not link.up:
            yield SetUp(Place.NODE, link.name)


def _tun(wanted: NodeWanted, actual: NodeActual) -> Iterator[Command]:
    """Routes come last: a link has none while it is down."""
    assert actual.tun is not None  # _check_node
    yield from _sysctls(_tun_sysctls(wanted, actual.ipv6), actual)
    if actual.tun.mtu != wanted.mtu:
        yield SetMtu(Place.NODE, wanted.tun, wanted.mtu)
    if actual.tun.txqueuelen != wanted.txqueuelen:
        yield SetTxQueueLength(wanted.tun, wanted.txqueuelen)
    if not actual.tun.up:
        yield SetUp(Place.NODE, wanted.tun)
    yield from _addresses(wanted.tun, wanted.tun_addresses, actual.tun_addresses)
    routes = [it for it in wanted.overlay if it.version == 4 or actual.ipv6]
    for stale in sorted(actual.overlay - set(routes), key=str):
        yield RemoveRoute(wanted.tun, stale)
    for missing in routes:
        if missing not in actual.overlay:
            yield AddRoute(Place.NODE, wanted.tun, missing)


def _addresses(
    link: str, wanted: tuple[IPInterface, ...], actual: frozenset[IPInterface]
) -> Iterator[AddAddress | RemoveAddress]:
    for stale in sorted(actual - set(wanted), key=str):
        yield RemoveAddress(link, stale)
    for missing in wanted:
        if missing not in actual:
            yield AddAddress(Place.NODE, link, missing)


_Values = tuple[tuple[str, str], ...]


def _all_sysctls(wanted: NodeWanted, ipv6: bool) -> _Values:
    return (
        *_forwarding_sysctls(ipv6),
        *_bridge_sysctls(wanted, ipv6),
        *_tun_sysctls(wanted, ipv6),
    )


def _forwarding_sysctls(ipv6: bool) -> _Values:
    return ((_FORWARDING_V4, "1"), *(((FORWARDING_V6, "1"),) if ipv6 else ()))


def _bridge_sysctls(wanted: NodeWanted, ipv6: bool) -> _Values:
    """The gateway is usable at once, and no container can advertise itself as the node's router."""
    directory = f"net/ipv6/conf/{wanted.bridge}"
    values = (("disable_ipv6", "0"), ("accept_dad", "0"), ("accept_ra", "0"))
    return tuple((f"{directory}/{key}", value) for key, value in values) if ipv6 else ()


def _tun_sysctls(wanted: NodeWanted, ipv6: bool) -> _Values:
    """Reverse path filtering is loose: a packet between two containers of this node comes out of the TUN
    with a source that is routed to the bridge. The kernel takes the larger of this and conf/all, so
    strict filtering elsewhere (1) stays as it is, and does not reach here. A link without an address gets
    no such leniency (fib_validate_source: no_addr), so the TUN borrows the gateway's; that is then also
    the source of what the kernel has to say to the overlay, instead of the uplink's address.

    What the workers have to say to a container (RFC 792, RFC 4443) comes out of the TUN with the gateway's address as
    its source, which the kernel takes for a forgery from outside unless `accept_local` is set (fib_validate_source).
    IPv6 has no such check.

    Without a link-local address the kernel sends nothing of its own into the overlay."""
    directory = f"net/ipv6/conf/{wanted.tun}"
    values = (("disable_ipv6", "0"), ("addr_gen_mode", "1"), ("accept_ra", "0"))
    v6 = tuple((f"{directory}/{key}", value) for key, value in values) if ipv6 else ()
    v4 = f"net/ipv4/conf/{wanted.tun}"
    return ((f"{v4}/rp_filter", "2"), (f"{v4}/accept_local", "1"), *v6)


def _sysctls(wanted: _Values, actual: NodeActual) -> Iterator[Command]:
    for path, value in wanted:
        if actual.sysctls.get(path) != value:
            yield SetSysctl(Place.NODE, path, value)


# --- A container --------------------------------------------------------------------------------


def plan_attachment(wanted: AttachmentWanted, actual: AttachmentActual) -> list[Command]:
    """The container's link as wanted, from nothing or from what is left of it.

    A link that leads elsewhere (the container has been replaced, or only half of the link was made) is
    made anew. Raises EnvironmentError_ if there is no bridge.
    """
    if actual.bridge is None:
        raise EnvironmentError_(f"network.bridge: expected the bridge {wanted.bridge}, got none")
    commands: list[Command] = []
    if actual.veth is not None and actual.peer is None:
        commands.append(DeleteLink(wanted.veth))
        actual = _without_link(actual)
    return [*commands, *_link(wanted, actual), *_inside(wanted, actual), *_commit(wanted, actual)]


def plan_offer(wanted: AttachmentWanted, actual: AttachmentActual) -> list[Command]:
    """The node's part of a link whose other end a runtime moves into its container, and sets addresses and routes of.

    A link that there was is made anew. Raises EnvironmentError_ if there is no bridge.
    """
    if actual.bridge is None:
        raise EnvironmentError_(f"network.bridge: expected the bridge {wanted.bridge}, got none")
    commands: list[Command] = [] if actual.veth is None else [DeleteLink(wanted.veth)]
    commands.append(CreateVeth(wanted.veth, wanted.bridge, wanted.interface, wanted.mac, wanted.mtu))
    if actual.ipv6:
        commands.append(SetSysctl(Place.NODE, f"net/ipv6/conf/{wanted.veth}/disable_ipv6", "1"))
    commands += [EnableGro(wanted.veth), SetUp(Place.NODE, wanted.veth), SetRecord(wanted.veth, wanted.record)]
    return commands


def plan_detachment(veth: str) -> list[Command]:
    """Everything of an attachment goes with its link."""
    return [DeleteLink(veth)]


def attachment_sysctls(veth: str, interface: str) -> tuple[tuple[Place, str], ...]:
    """The sysctls that `plan_attachment` looks at."""
    return tuple((place, path) for place, path, _ in _attachment_sysctls(veth, interface))


def _without_link(actual: AttachmentActual) -> AttachmentActual:
    """The container once the link is deleted."""
    return AttachmentActual(
        ipv6=actual.ipv6,
        bridge=actual.bridge,
        names=actual.names,
        loopback_up=actual.loopback_up,
        defaults=actual.defaults,
    )


def super_packet_max(mtu: int) -> int:
    """`gso_max_size` of a container's link, bytes: a TCP super-packet then leaves a worker as one train.

    The kernel takes MAX_TCP_HEADER off it (some 320 bytes) and fills the rest with whole segments; those, with their
    headers written out, must stay within `limits.GSO_BYTES_MAX`. One of 64 KiB would leave as 44 segments and then 2.
    """
    segments = min(limits.GSO_BYTES_MAX // mtu, limits.UDP_SEGMENTS_MAX)
    return segments * (mtu - TCP_HEADERS) + TCP_ROOM


def _link(wanted: AttachmentWanted, actual: AttachmentActual) -> Iterator[Command]:
    """Both ends, and what must be set before they are up."""
    veth, peer = actual.veth, actual.peer
    if veth is None or peer is None or actual.bridge is None:
        yield CreateVeth(wanted.veth, wanted.bridge, wanted.interface, wanted.mac, wanted.mtu)
    else:
        if veth.master != actual.bridge.index:
            yield SetMaster(wanted.veth, wanted.bridge)
        if veth.mtu != wanted.mtu:
            yield SetMtu(Place.NODE, wanted.veth, wanted.mtu)
        if peer.mtu != wanted.mtu:
            yield SetMtu(Place.CONTAINER, wanted.interface, wanted.mtu)
    if actual.ipv6:
        yield from _link_sysctls(wanted, actual)
    if not actual.gro:
        yield EnableGro(wanted.veth)
    addresses = tuple(it.ip for it in wanted.addresses)
    if actual.guard != guard.name(addresses):
        yield Guard(wanted.veth, addresses)


def _attachment_sysctls(veth: str, interface: str) -> tuple[tuple[Place, str, str], ...]:
    """The node's end is a port and needs no address of its own. The container's end has IPv6, whatever
    the container's default is, at once, and does not let a neighbour advertise itself as its router."""
    values = (("disable_ipv6", "0"), ("accept_dad", "0"), ("accept_ra", "0"))
    return (
        (Place.NODE, f"net/ipv6/conf/{veth}/disable_ipv6", "1"),
        *((Place.CONTAINER, f"net/ipv6/conf/{interface}/{key}", value) for key, value in values),
    )


def _link_sysctls(wanted: AttachmentWanted, actual: AttachmentActual) -> Iterator[Command]:
    inside = any(it.version == 6 for it in wanted.addresses)
    for place, path, value in _attachment_sysctls(wanted.veth, wanted.interface):
        if (inside or place is Place.NODE) and actual.sysctls.get((place, path)) != value:
            yield SetSysctl(place, path, value)


def _inside(wanted: AttachmentWanted, actual: AttachmentActual) -> Iterator[Command]:
    """A container reaches its own addresses through its loopback link, so that must be up too. Whoever is told of the
    attachment may call it at once: a first packet that is dropped costs a second."""
    if actual.veth is None or not actual.veth.up:
        yield SetUp(Place.NODE, wanted.veth)
    if not actual.loopback_up:
        yield SetUp(Place.CONTAINER, "lo")
    if actual.peer is None or not actual.peer.up:
        yield SetUp(Place.CONTAINER, wanted.interface)
    for interface in wanted.addresses:
        if interface not in actual.addresses:
            yield AddAddress(Place.CONTAINER, wanted.interface, interface)
    for gateway in wanted.gateways:
        for destination in _destinations(gateway, wanted.overlay, actual.defaults):
            if destination not in actual.routes:
                yield AddRoute(Place.CONTAINER, wanted.interface, destination, gateway)
    if actual.veth is None or not actual.veth.carrier:
        yield AwaitCarrier(Place.NODE, wanted.veth)
        yield AwaitCarrier(Place.CONTAINER, wanted.interface)


def _destinations(gateway: IPAddress, overlay: Iterable[IPNetwork], defaults: Collection[int]) -> list[IPNetwork]:
    """Everything, or only the overlay where the container has another way out already."""
    if gateway.version in defaults:
        return [network for network in overlay if network.version == gateway.version]
    return [default_route(gateway.version)]


def _commit(wanted: AttachmentWanted, actual: AttachmentActual) -> Iterator[Command]:
    if actual.veth is None or actual.veth.alias != wanted.record:
        yield SetRecord(wanted.veth, wanted.record)
