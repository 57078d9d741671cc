"""Worlds, packets and conversations for hypothesis.

Everything is drawn from small pools, so that what is drawn meets: the same few containers, ports and payloads
come up again and again, flows collide, answers find their questions. Most packets are right, some are nearly
right (one field, a length or a bit is off), a few are noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Literal

from hypothesis import strategies as st

from tests.oracle.build import (
    ACK,
    CWR,
    DESTINATION_OPTIONS,
    ECE,
    FIN,
    FRAGMENT_HEADER,
    HOP_BY_HOP,
    ICMP,
    ICMPV6,
    NOP_NOP_TIMESTAMP,
    PSH,
    ROUTING,
    SYN,
    TCP,
    UDP,
    EchoFields,
    TcpFields,
    UdpFields,
    echo,
    error,
    extended,
    fragments,
    ip,
    light,
    sctp,
    tcp,
    udp,
)
from tests.oracle.checksum import checksum
from tests.oracle.model import (
    ANY,
    CLOSEST,
    KNOWN,
    LEAST_FLOWS,
    MAGLEV,
    OFF,
    ROUND_ROBIN,
    Address,
    Host,
    Node,
    Service,
    World,
)
from tests.oracle.packet import CHECKSUM_OFFSET, WHOLE, DropError, Packet, read
from tests.oracle.peers import wire_name
from tests.oracle.virtio import (
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NEEDS_CSUM,
    PLAIN,
    SIZE,
    Vnet,
)
from tests.packets.fixture import Later, Learn, Refuse, Tun, Wire
from tests.packets.fixtures.tso import data
from tests.packets.world import FOUR, SIX

OWN = ("192.0.2.1", 50103)
OTHERS = [("192.0.2.2", 50103), ("2001:db8::3", 50104), ("192.0.2.1", 50104)]  # the last has our address, not our port
NODES = [*OTHERS, OWN, OWN]
NOBODY = ("192.0.2.99", 50103)  # no node of the cluster
GATEWAYS = ["10.18.0.1", "fc00::1"]
NAMESPACES = ([f"10.18.0.{n}" for n in range(2, 8)], [f"fc00::{n}" for n in range(2, 8)])
INSTANCES = ([f"10.30.0.{n}" for n in range(2, 8)], [f"fdff::{n}" for n in range(2, 8)])
SERVICES = ([f"10.30.30.{n}" for n in range(4)], [f"fdff:2000::{n}" for n in range(4)])
ODD = (
    ["10.30.99.99", "198.51.100.1", "0.0.0.0", "255.255.255.255", "127.0.0.1"],
    ["fdff:2000::99", "2001:db8::99", "::", "ff02::1", "::1", "::ffff:10.18.0.2", "::ffff:10.30.30.1"],
)
UNKNOWN = ["10.30.99.99", "fdff:2000::99"]  # in the range, in no table
PORTS = st.sampled_from([80, 80, 80, 1000, 1000, 1000, 0, 65535])

EXTRA_OPTIONS = [b"", b"", b"\1" * 4, NOP_NOP_TIMESTAMP + bytes(8), b"\1" * 40]


# -- worlds --

_nodes = st.sampled_from([Node(*node, mtu=mtu) for node in OTHERS[:2] for mtu in (0, 0, 150, 1400)])


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A node's tables: containers here and elsewhere, instance IPs that may be missing, any backends, any paths."""
    world = World(
        *OWN,
        service_ranges=["10.30.0.0/16", "fdff::/16"],
        nodes=draw(st.lists(_nodes, max_size=3, unique_by=lambda node: node.address)),
        gateways=draw(st.sampled_from([GATEWAYS, GATEWAYS, []])),
        learn_hosts=draw(st.sampled_from([KNOWN, KNOWN, KNOWN, ANY, OFF])),
    )
    for family in draw(st.sampled_from([(FOUR,), (SIX,), (FOUR, SIX)])):
        _add_hosts(draw, world, family)
        _add_services(draw, world, family)
    return world


def _add_hosts(draw: st.DrawFn, world: World, family: int) -> None:
    nodes = [OWN, draw(st.sampled_from(NODES)), *draw(st.lists(st.sampled_from(NODES), max_size=4))]
    for address, instance, node in zip(NAMESPACES[family], INSTANCES[family], nodes, strict=False):
        named = draw(_mostly)
        world.hosts.append(Host(address, *node, instance if named else None))
        if named and draw(_mostly):
            world.services.append(Service(instance, "instance", backends=[address]))


def _add_services(draw: st.DrawFn, world: World, family: int) -> None:
    known = [host.address for host in world.hosts if host.address in NAMESPACES[family]]
    backends = st.lists(st.sampled_from([*known * 3, NAMESPACES[family][-1]]), max_size=4)
    for address in draw(st.lists(st.sampled_from(SERVICES[family]), unique=True, min_size=1, max_size=3)):
        world.services.append(draw(_balanced(address, draw(backends))))


@st.composite
def _balanced(draw: st.DrawFn, address: str, backends: list[str]) -> Service:
    """A ServiceIP of any policy, most weights alike."""
    policy = draw(st.sampled_from([ROUND_ROBIN, CLOSEST, LEAST_FLOWS, MAGLEV]))
    alike = st.just([1] * len(backends))
    weights = st.lists(st.integers(0, 4), min_size=len(backends), max_size=len(backends))
    near = draw(st.integers(0, len(backends))) if policy == CLOSEST else 0
    sticky = draw(st.sampled_from([0, 0, 60]))
    return Service(address, policy, backends, draw(alike | weights), near, sticky, draw(st.booleans()))


_mostly = st.sampled_from([True, True, True, False])


def here(world: World, family: int) -> list[str]:
    """The namespace addresses of this node's containers."""
    return [
        host.address for host in world.hosts if (host.node, host.port) == OWN and host.address in NAMESPACES[family]
    ]


def names(world: World, family: int) -> list[str]:
    """The addresses under which containers appear on the underlay."""
    return [str(wire_name(host)) for host in world.hosts if host.address in NAMESPACES[family]]


def dialled(world: World, family: int) -> list[str]:
    """What a container may dial: ServiceIPs, more often the balanced ones, and namespace addresses."""
    services = [service.address for service in world.services if service.address in SERVICES[family]]
    return services * 4 + names(world, family) + NAMESPACES[family][:4] + UNKNOWN[family : family + 1]


def families(world: World) -> st.SearchStrategy[int]:
    """The families that the world has containers of."""
    return st.sampled_from(sorted({(4, 6).index(ip_address(host.address).version) for host in world.hosts}))


# -- packets --


@st.composite
def packets(draw: st.DrawFn, world: World, outward: bool, partial: bool = False) -> bytes:
    """A packet that passes all checks on its shape, with addresses that mostly mean something in the world."""
    family = draw(families(world))
    odd = st.sampled_from(ODD[family])
    inside = draw(odd if draw(_seldom) else st.sampled_from(here(world, family)))
    others = dialled(world, family) if outward else names(world, family)
    outside = draw(odd if draw(_seldom) else st.sampled_from(others))
    ends = (inside, outside) if outward else (outside, inside)
    if partial:
        return draw(st.sampled_from([_tcp, _udp]))(draw, *ends, partial)
    build = draw(st.sampled_from([_tcp, _tcp, _udp, _udp, _echo, _other, _error]))
    packet = build(draw, *ends, partial)
    return draw(_extended(packet)) if family == SIX and draw(_seldom) else packet


@st.composite
def _extended(draw: st.DrawFn, packet: bytes) -> bytes:
    """An IPv6 packet behind extension headers, in any order."""
    headers = st.sampled_from(
        [
            (HOP_BY_HOP, bytes(6)),
            (DESTINATION_OPTIONS, bytes(6)),
            (DESTINATION_OPTIONS, bytes(14)),
            (ROUTING, b"\4\0" + bytes(4)),
            (ROUTING, b"\4\1" + bytes(4)),
            (FRAGMENT_HEADER, bytes(6)),
        ]
    )
    return extended(packet, *draw(st.lists(headers, min_size=1, max_size=5)))


def _other(draw: st.DrawFn, source: str, destination: str, _partial: bool) -> bytes:
    """A protocol that is known by its addresses, or by ports without an Internet checksum."""
    kind = draw(st.sampled_from(["sctp", "light", "any"]))
    if kind == "sctp":
        return sctp(source, destination, draw(PORTS), draw(PORTS))
    if kind == "light":
        return light(source, destination, draw(PAYLOADS), error=draw(st.sampled_from([0, 0, 1])))
    return ip(source, destination, draw(st.sampled_from([0, 33, 47, 50, 59, 255])), draw(st.binary(max_size=20)))


def _error(draw: st.DrawFn, source: str, destination: str, _partial: bool) -> bytes:
    """An ICMP error about a packet the other way round, or about any; answers to what came out make better ones."""
    family = (4, 6).index(ip_address(source).version)
    kind = draw(st.sampled_from([[(3, 3), (3, 4), (11, 0), (12, 0)], [(1, 4), (2, 0), (3, 0), (4, 0)]][family]))
    quote = udp(destination, source, draw(PORTS), draw(PORTS), draw(PAYLOADS))
    return error(
        source, destination, *kind, quote[: draw(st.integers(0, len(quote)))], draw(st.sampled_from([0, 1300]))
    )


_seldom = st.sampled_from([False] * 9 + [True])


def _fill(draw: st.DrawFn, partial: bool) -> tuple[Literal["valid", "partial"], int]:
    """How a checksum is filled in, and how wrong it is."""
    return ("partial", 0) if partial else ("valid", draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, 0xFFFE])))


PAYLOADS = st.one_of(
    st.integers(0, 40).map(data),
    st.integers(0, 40).map(data),
    st.binary(max_size=6),
    st.sampled_from([b"\xff" * 8, b"\xff" * 9, bytes(8), bytes(9)]),
)


def _tcp(draw: st.DrawFn, source: str, destination: str, partial: bool) -> bytes:
    fields: TcpFields = {
        "flags": draw(st.sampled_from([ACK, ACK, ACK | PSH, SYN, ACK | FIN, ACK | CWR | ECE | PSH | FIN, 0xFF])),
        "seq": draw(st.sampled_from([1, 2**32 - 1])),
        "options": draw(st.sampled_from(EXTRA_OPTIONS)),
        "ip_options": draw(st.sampled_from([b"", b"", b"", b"\1" * 4, b"\1" * 40])),
        "ip_id": draw(st.sampled_from([0, 0xFFFF])),
        "fragment_flags": draw(st.sampled_from([2, 0])),
        "tos": draw(st.sampled_from([0, 0xFF])),
        "ttl": draw(st.sampled_from([64, 1, 0])),
    }
    fields["checksum"], fields["error"] = _fill(draw, partial)
    return tcp(source, destination, draw(PORTS), draw(PORTS), draw(PAYLOADS), **fields)


def _udp(draw: st.DrawFn, source: str, destination: str, partial: bool) -> bytes:
    fields: UdpFields = {
        "ip_options": draw(st.sampled_from([b"", b"", b"", b"\1" * 8])),
        "ip_id": draw(st.sampled_from([0, 0xFFFF])),
        "fragment_flags": draw(st.sampled_from([2, 0])),
        "flow_label": draw(st.sampled_from([0, 0xFFFFF])),
    }
    fields["checksum"], fields["error"] = _fill(draw, partial)
    if not partial and ip_address(source).version == 4 and draw(st.sampled_from([False, False, True])):
        fields["checksum"] = 0
    return udp(source, destination, draw(PORTS), draw(PORTS), draw(PAYLOADS), **fields)


def _echo(draw: st.DrawFn, source: str, destination: str, partial: bool) -> bytes:
    fields: EchoFields = {"reply": draw(st.booleans()), "sequence": draw(st.sampled_from([1, 2]))}
    fields["checksum"], fields["error"] = _fill(draw, partial)
    return echo(source, destination, draw(st.sampled_from([7, 80, 0])), draw(PAYLOADS), **fields)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """The packet with one thing wrong: a byte, its end, or its end and the length that the header gives."""
    how = draw(st.sampled_from(["bits", "cut", "longer", "cut and said so"]))
    if how == "bits":
        at = draw(st.one_of(st.integers(0, min(len(sound), 60) - 1), st.integers(0, len(sound) - 1)))
        return sound[:at] + bytes([sound[at] ^ draw(st.integers(1, 255))]) + sound[at + 1 :]
    if how == "longer":
        return sound + draw(st.binary(min_size=1, max_size=8))
    short = sound[: draw(st.integers(0, len(sound)))]
    return _said(short) if how == "cut and said so" else short


def _said(short: bytes) -> bytes:
    """The packet with its IP length field made right."""
    if len(short) >= 40 and short[0] >> 4 == 6:
        return short[:4] + (len(short) - 40).to_bytes(2, "big") + short[6:]
    if len(short) >= 20 and short[0] >> 4 == 4:
        return short[:2] + len(short).to_bytes(2, "big") + short[4:]
    return short


def _forwarded(packet: bytes) -> bytes:
    """The packet with a right IPv4 header checksum: no super-packet passes the kernel with a wrong one."""
    length = 4 * (packet[0] & 15) if packet and packet[0] >> 4 == 4 else 0
    if not 20 <= length <= len(packet):
        return packet
    field = checksum(packet[:10] + packet[12:length])
    return packet[:10] + field.to_bytes(2, "big") + packet[12:]


# -- inputs --


@st.composite
def reads(draw: st.DrawFn, world: World) -> Tun:
    """A read from the TUN: a packet, one with a partial checksum, a super-packet, or something wrong."""
    kind = draw(
        st.sampled_from(["whole", "whole", "partial", "super", "super", "super", "damaged", "odd vnet", "noise"])
    )
    if kind == "noise":
        return Tun(draw(st.binary(max_size=80)), draw(st.binary(min_size=SIZE, max_size=SIZE)))
    packet = draw(packets(world, outward=True, partial=kind in ("partial", "super", "odd vnet")))
    if kind == "damaged":
        if draw(st.booleans()):
            return Tun(draw(damaged(packet)))
        return Tun(_forwarded(draw(damaged(packet))), draw(_headers(packet)).pack())
    if kind == "odd vnet":
        return Tun(packet, draw(_odd_headers(packet)).pack())
    return Tun(packet, PLAIN if kind == "whole" else draw(_headers(packet, gso=kind == "super")).pack())


@st.composite
def _headers(draw: st.DrawFn, packet: bytes, gso: bool = True) -> Vnet:
    """The virtio header that the kernel would put before a packet with a partial checksum."""
    try:
        view = read(packet)
    except DropError:
        return Vnet()
    if view.protocol not in CHECKSUM_OFFSET:
        return Vnet()
    usual = Vnet(NEEDS_CSUM, GSO_NONE, 0, 0, view.l4, CHECKSUM_OFFSET[view.protocol])
    if not gso or view.protocol in (ICMP, ICMPV6):
        return usual
    kind = {(4, TCP): GSO_TCPV4, (6, TCP): GSO_TCPV6}.get((view.version, view.protocol), GSO_UDP_L4)
    ecn = GSO_ECN if view.protocol == TCP and draw(st.booleans()) else 0
    size = draw(st.one_of(st.integers(1, 12), st.sampled_from([len(view.payload) or 1, 1400])))
    header = draw(st.sampled_from([view.payload_at, 0]))
    return usual._replace(gso_type=kind | ecn, gso_size=size, hdr_len=header)


@st.composite
def _odd_headers(draw: st.DrawFn, packet: bytes) -> Vnet:
    """A virtio header with one field off."""
    usual = draw(_headers(packet))
    start = read(packet).l4
    off = draw(
        st.sampled_from(
            [
                {"gso_type": draw(st.integers(0, 255))},
                {"gso_size": 0},
                {"flags": draw(st.integers(0, 255))},
                {"hdr_len": draw(st.integers(0, 0xFFFF))},
                {"csum_offset": draw(st.integers(0, len(packet)))},
                {"csum_start": draw(st.integers(start, len(packet)))},
                {"csum_start": draw(st.integers(start, len(packet))), "csum_offset": draw(st.integers(0, 8))},
            ]
        )
    )
    return usual._replace(**off)


@st.composite
def datagrams(draw: st.DrawFn, world: World) -> Wire:
    """A read from the underlay: one datagram, right or not, or a train."""
    kind = draw(st.sampled_from(["packet", "packet", "damaged", "train", "noise"]))
    if kind == "train":
        return draw(make_trains(world))
    if kind == "noise":
        return Wire(draw(st.binary(max_size=80)), draw(st.integers(0, 90)))
    packet = draw(packets(world, outward=False))
    return Wire(draw(damaged(packet)) if kind == "damaged" else packet, source=draw(outer(world, packet)))


@st.composite
def outer(draw: st.DrawFn, world: World, packet: bytes) -> tuple[str, int]:
    """Where a datagram comes from: mostly the node of its sender."""
    at_home = [NOBODY, NOBODY, *OTHERS]
    try:
        source = read(packet).source
    except DropError:
        return draw(st.sampled_from(at_home))
    owners = [(host.node, host.port) for host in world.hosts if source in (ip_address(host.address), wire_name(host))]
    return owners[0] if owners and owners[0] != OWN and draw(_mostly) else draw(st.sampled_from(at_home))


# -- fragments --


@st.composite
def split(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    """A packet's fragments, in any order; now and then one twice, one missing, or one of another datagram."""
    sizes = draw(st.lists(st.sampled_from([8, 16, 24, 32]), min_size=1, max_size=4))
    start = 4 * (whole[0] & 15) if whole[0] >> 4 == 4 else 40
    while sizes and start + sum(sizes) >= len(whole):
        sizes.pop()
    pieces = fragments(whole, *sizes, ident=draw(st.sampled_from([1, 2])))
    if draw(_seldom) and sizes:
        pieces += fragments(whole, *sizes[::-1], ident=1)
    return draw(st.permutations(pieces))[draw(st.sampled_from([0, 0, 0, 1])) :]


# -- trains --


@dataclass
class _Stream:
    """A TCP or UDP flow of a train: its next packet continues where the last one ended."""

    family: int
    source: str
    destination: str
    protocol: int
    sport: int
    sent: int = 0
    count: int = 0

    def packet(self, total: int, change: TcpFields) -> bytes:
        """The next packet of `total` bytes, with these fields different from usual."""
        header = (20, 40)[self.family] + (20 if self.protocol == TCP else 8)
        fields: TcpFields = {"seq": self.sent, "ip_id": self.count, **change}
        options = len(fields.get("options", b"")) + len(fields.get("ip_options", b"") if self.family == 0 else b"")
        payload = bytes((self.sent + n) % 251 for n in range(max(0, total - header - options)))
        self.sent, self.count = self.sent + len(payload), self.count + 1
        if self.protocol == TCP:
            return tcp(self.source, self.destination, self.sport, 1000, payload, **fields)
        return _datagram(self, payload, fields)


def _datagram(stream: _Stream, payload: bytes, change: TcpFields) -> bytes:
    """A UDP packet with those of the fields that UDP has."""
    fields: UdpFields = {"ip_id": stream.count}
    for name in UdpFields.__annotations__.keys() & change.keys():
        fields[name] = change[name]  # type: ignore[literal-required]
    return udp(stream.source, stream.destination, stream.sport, 1000, payload, **fields)


CHANGES: list[TcpFields] = [
    {"flags": ACK | PSH},
    {"flags": ACK | FIN},
    {"flags": ACK | SYN},
    {"flags": ACK | CWR},
    {"error": 1},
    {"header_error": 1},
    {"checksum": 0},
    {"ack": 2},
    {"window": 5},
    {"tos": 2},
    {"ttl": 9},
    {"ip_id": 0},
    {"fragment_flags": 0},
    {"fragment_flags": 1},
    {"ip_options": b"\1" * 4},
    {"options": b"\1" * 12},
    {"seq": 0},
    {"flow_label": 3},
]


@st.composite
def make_trains(draw: st.DrawFn, world: World, longest: int = 12, largest: int = 120) -> Wire:
    """A train as UDP_GRO hands it over: datagrams of one size but the last, of one to three flows."""
    size = draw(st.integers(60, largest))
    streams = draw(st.lists(_streams(world), min_size=1, max_size=3))
    packets = []
    for _ in range(draw(st.integers(1, longest))):
        stream = streams[draw(st.sampled_from([0, 0, 0, 1, 2])) % len(streams)]
        change = draw(st.sampled_from(CHANGES)) if draw(st.sampled_from([0, 0, 0, 1])) else TcpFields()
        packets.append(stream.packet(size, change)[:size].ljust(size, b"\0"))
    last = streams[0].packet(draw(st.integers(48, size)), draw(st.sampled_from([TcpFields(), TcpFields(), *CHANGES])))
    return Wire(b"".join(packets) + last[:size], size, draw(outer(world, packets[0])))


@st.composite
def _streams(draw: st.DrawFn, world: World) -> _Stream:
    """A flow from anybody to, mostly, a container of this node."""
    family = draw(families(world))
    return _Stream(
        family,
        draw(st.sampled_from(names(world, family))),
        draw(st.sampled_from(here(world, family) * 3 + ODD[family][:1])),
        draw(st.sampled_from([TCP, TCP, UDP])),
        draw(st.sampled_from([80, 81])),
    )


# -- conversations --


@dataclass(frozen=True)
class Answer:
    """An answer to something that came out before: the `which`-th packet, counted around.

    To an echo request it is the reply or, with `crossing`, a request of the other end with the same id; to TCP
    and UDP, with `crossing`, it is the other of the two.
    """

    which: int
    payload: bytes
    crossing: bool


@dataclass(frozen=True)
class Redial:
    """An earlier read from the TUN again, the `which`-th counted back, but to another address."""

    which: int
    dialled: str


@dataclass(frozen=True)
class Complain:
    """An ICMP error about something that came out before: the `which`-th packet, counted around, quoted so far."""

    which: int
    kind: int
    quoted: int


Move = Tun | Wire | Learn | Refuse | Later | Answer | Redial | Complain


@st.composite
def conversations(draw: st.DrawFn, world: World, longest: int = 14) -> list[Move]:
    """Inputs of all kinds, among them answers to what came out before and calls like an earlier one."""
    which = st.integers(0, 7)
    answers = st.builds(Answer, which, st.binary(max_size=3), st.sampled_from([False, False, True]))
    anything = [address for family in (FOUR, SIX) for address in dialled(world, family)]
    redials = st.builds(Redial, which, st.sampled_from(anything))
    complaints = st.builds(Complain, which, st.integers(0, 3), st.integers(20, 120))
    happenings = st.one_of(
        st.builds(Learn, altered(world)),
        st.builds(Refuse, st.sampled_from(UNKNOWN)),
        st.builds(Later, st.sampled_from([0.01, 0.1, 1.0, 2.0, 3.0])),
    )
    moves = st.one_of(
        reads(world),
        reads(world),
        answers,
        answers,
        redials,
        datagrams(world),
        complaints,
        happenings,
        in_pieces(world),
    )
    drawn = draw(st.lists(moves, min_size=4, max_size=longest))
    return [move for item in drawn for move in (item if isinstance(item, list) else [item])]


@st.composite
def in_pieces(draw: st.DrawFn, world: World) -> list[Move]:
    """A datagram in fragments from either side."""
    outward = draw(st.booleans())
    packet = draw(packets(world, outward=outward))
    if outward:
        return [Tun(piece) for piece in draw(split(packet))]
    source = draw(outer(world, packet))
    return [Wire(piece, source=source) for piece in draw(split(packet))]


@st.composite
def altered(draw: st.DrawFn, world: World) -> World:
    """Tables that differ in one thing: what nobody knew is known, a container is gone or moved, a path is narrow."""
    how = draw(st.sampled_from(["known", "known", "gone", "moved", "path", "same"]))
    if how == "known":
        address = draw(st.sampled_from(UNKNOWN))
        backends = [h.address for h in world.hosts if ip_address(h.address).version == ip_address(address).version]
        return replace(world, services=[*world.services, Service(address, backends=backends[:1])])
    if how == "gone":
        return replace(world, hosts=world.hosts[:-1])
    if how == "moved":
        last = world.hosts[-1]
        node = draw(st.sampled_from(OTHERS))
        return replace(world, hosts=[*world.hosts[:-1], replace(last, node=node[0], port=node[1])])
    if how == "path":
        return replace(world, nodes=[Node(*OTHERS[0], mtu=draw(st.sampled_from([0, 100, 1400])))])
    return world


def complaint(world: World, packet: Packet, delivered: bool, move: Complain) -> Tun | Wire | None:
    """An ICMP error of the receiver of a packet, to the TUN if it is here, else from the underlay."""
    family = (4, 6).index(packet.version)
    if packet.kind != WHOLE:
        return None
    kind = ([(3, 3), (3, 4), (11, 0), (12, 0)], [(1, 4), (2, 0), (3, 0), (4, 0)])[family][move.kind]
    quote = packet.data[: move.quoted]
    if delivered:
        return Tun(error(str(packet.destination), str(packet.source), *kind, quote))
    owners = {wire_name(host): host.address for host in world.hosts}
    hosts = {ip_address(host.address): host for host in world.hosts}
    host = hosts.get(packet.destination)
    source = str(wire_name(host)) if host else str(packet.destination)
    node = (host.node, host.port) if host else OTHERS[0]
    return Wire(error(source, owners.get(packet.source, str(packet.source)), *kind, quote), source=node)


def redialled(packet: Packet, address: str) -> Tun | None:
    """The packet as its sender would send it to another address; None if that is of the other family."""
    if ip_address(address).version != packet.version:
        return None
    return Tun(_turned(packet, packet.source, ip_address(address), Answer(0, b"", crossing=False), again=True))


def answer_to(world: World, packet: Packet, delivered: bool, answer: Answer) -> Tun | Wire:
    """What the receiver of a packet sends back: through the TUN if it is here, else from the underlay."""
    if delivered:
        return Tun(_turned(packet, packet.destination, packet.source, answer))
    names = {ip_address(host.address): wire_name(host) for host in world.hosts}
    nodes = {ip_address(host.address): (host.node, host.port) for host in world.hosts}
    owners = {wire_name(host): ip_address(host.address) for host in world.hosts}
    source = names.get(packet.destination, packet.destination)
    node = nodes.get(packet.destination, OTHERS[0])
    return Wire(_turned(packet, source, owners.get(packet.source, packet.source), answer), source=node)


def _turned(packet: Packet, source: Address, destination: Address, answer: Answer, again: bool = False) -> bytes:
    """A packet between these addresses: the other way, or the same way again."""
    sport, dport = packet.ports if again else packet.ports[::-1]
    ends = str(source), str(destination)
    if packet.protocol not in (TCP, UDP, ICMP, ICMPV6):
        return ip(*ends, packet.protocol, packet.data[packet.l4 :])
    if packet.protocol in (ICMP, ICMPV6):
        reply = packet.is_reply is (again or answer.crossing)
        return echo(*ends, max(sport, dport), answer.payload, reply=reply)
    if (packet.protocol == TCP) is answer.crossing:
        return udp(*ends, sport, dport, answer.payload)
    return tcp(*ends, sport, dport, answer.payload)
