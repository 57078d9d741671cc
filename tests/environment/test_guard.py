"""A container that sends as if it were a neighbour, the gateway, or another network: frames, and who receives them.

thief ── veth ── bridge ── veth ── neighbour
"""

import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import pytest

from appliance.environment import Attachment, guard, names
from appliance.environment.addresses import IPAddress
from tests.environment.netns import Netns
from tests.environment.settings import attach, converged

pytestmark = pytest.mark.root

_ETH_P_ALL = 3
IPV4, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
ICMP6, UDP, HOP_BY_HOP, ROUTING, OPTIONS, FRAGMENT = 58, 17, 0, 43, 60, 44
SOLICITATION, ADVERTISEMENT, ROUTER, REDIRECT = 135, 136, 134, 137
OUTSIDE, OUTSIDE_V6, LINK_LOCAL = ip_address("198.51.100.9"), ip_address("2001:db8::9"), ip_address("fe80::9")
BROADCAST = b"\xff" * 6
END = b"the last frame"


@dataclass(frozen=True)
class Wire:
    """Two containers of one bridge, and a packet socket in each."""

    node: Netns
    thief: Attachment
    neighbour: Attachment
    sending: socket.socket
    receiving: socket.socket

    def passes(self, frame: bytes) -> bool:
        """Whether the neighbour receives a frame of the thief: before one that is the thief's own, which it does."""
        assert self.thief.address_v4 is not None
        last = frame_of(mac_of(self.thief), IPV4, v4(self.thief.address_v4, END))
        self.sending.send(frame)
        self.sending.send(last)
        got = []
        while last not in got:
            got.append(self.receiving.recv(2048))
        return frame in got


def packet_socket(container: Netns) -> socket.socket:
    """Sends and receives whole frames at a container's link."""

    def made() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        sock.bind(("eth0", _ETH_P_ALL))
        sock.settimeout(5)
        return sock

    return container.call(made)


@pytest.fixture
def wire(node: Netns, make_netns: Callable[[], Netns]) -> Iterator[Wire]:
    """See :class:`Wire`."""
    one, two = make_netns(), make_netns()
    for name in ("arptables", "iptables", "ip6tables"):  # br_netfilter has opinions of its own about packets
        if (path := Path("/proc/sys/net/bridge") / f"bridge-nf-call-{name}").exists():
            node.set_sysctl(str(path.relative_to("/proc/sys")), "0")

    async def both() -> list[Attachment]:
        manager = await converged()
        return [await attach(manager, it, number) for number, it in enumerate((one, two))]

    thief, neighbour = node.run(both)
    with packet_socket(one) as sending, packet_socket(two) as receiving:
        yield Wire(node, thief, neighbour, sending, receiving)


def mac_of(attachment: Attachment) -> bytes:
    """A container's hardware address."""
    return bytes.fromhex(names.container_mac(attachment.addresses[0]).replace(":", ""))


def frame_of(source: bytes, kind: int, payload: bytes) -> bytes:
    """To whoever listens: a bridge floods it."""
    return BROADCAST + source + struct.pack("!H", kind) + payload


def v4(source: IPAddress, payload: bytes = b"") -> bytes:
    """A packet without a valid checksum, which is not what a link looks at."""
    return (
        struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, 64, 253, 0, source.packed, b"\xff" * 4) + payload
    )


def arp(sender: IPAddress, operation: int = 2) -> bytes:
    """An answer (or a question) of whoever has, or says to have, an address."""
    return struct.pack("!HHBBH6s4s6s4s", 1, IPV4, 6, 4, operation, bytes(6), sender.packed, bytes(6), sender.packed)


def v6(source: IPAddress, following: int = UDP, payload: bytes = bytes(8)) -> bytes:
    """A packet to all nodes of the link."""
    return struct.pack("!IHBB", 6 << 28, len(payload), following, 255) + source.packed + ALL_NODES + payload


ALL_NODES = IPv6Address("ff02::1").packed


def icmp6(kind: int, target: IPAddress) -> bytes:
    """Neighbour discovery's messages, as far as they are alike."""
    return struct.pack("!BBHI", kind, 0, 0, 0) + target.packed


def behind(extensions: list[int], kind: int, target: IPAddress) -> tuple[int, bytes]:
    """The same behind extension headers; the first one's number, and everything."""
    payload, following = icmp6(kind, target), ICMP6
    for number, extension in enumerate(reversed(extensions)):
        body = bytes((following, number % 2, *bytes(6 + 8 * (number % 2))))
        payload, following = body + payload, extension
    return following, payload


def test_ipv4_passes_from_the_own_address_alone(wire: Wire) -> None:
    thief, neighbour = wire.thief, wire.neighbour
    assert thief.address_v4 is not None
    assert neighbour.address_v4 is not None
    assert thief.gateway_v4 is not None
    own = mac_of(thief)
    assert wire.passes(frame_of(own, IPV4, v4(thief.address_v4, b"own")))
    for forged in (neighbour.address_v4, thief.gateway_v4, OUTSIDE, ip_address("0.0.0.0")):
        assert not wire.passes(frame_of(own, IPV4, v4(forged)))


def test_arp_speaks_of_the_own_address_alone(wire: Wire) -> None:
    thief, neighbour = wire.thief, wire.neighbour
    assert thief.address_v4 is not None
    assert neighbour.address_v4 is not None
    assert thief.gateway_v4 is not None
    own = mac_of(thief)
    for operation in (1, 2):
        assert wire.passes(frame_of(own, ARP, arp(thief.address_v4, operation)))
        assert not wire.passes(frame_of(own, ARP, arp(neighbour.address_v4, operation)))
        assert not wire.passes(frame_of(own, ARP, arp(thief.gateway_v4, operation)))
    assert wire.passes(frame_of(own, ARP, arp(ip_address("0.0.0.0"), 1)))


def test_ipv6_passes_from_the_own_address_and_from_those_of_the_link(wire: Wire) -> None:
    thief, neighbour = wire.thief, wire.neighbour
    assert thief.address_v6 is not None
    assert neighbour.address_v6 is not None
    assert thief.gateway_v6 is not None
    own = mac_of(thief)
    for source in (thief.address_v6, LINK_LOCAL, ip_address("::")):
        assert wire.passes(frame_of(own, IPV6, v6(source)))
    for forged in (neighbour.address_v6, thief.gateway_v6, OUTSIDE_V6, ip_address("::1"), ip_address("fec0::9")):
        assert not wire.passes(frame_of(own, IPV6, v6(forged)))


@pytest.mark.parametrize("extensions", [[], [HOP_BY_HOP], [OPTIONS] * 4, [HOP_BY_HOP, ROUTING, OPTIONS]], ids=len)
def test_neighbour_discovery_speaks_of_the_own_address_alone(wire: Wire, extensions: list[int]) -> None:
    thief, neighbour = wire.thief, wire.neighbour
    assert thief.address_v6 is not None
    assert neighbour.address_v6 is not None
    assert thief.gateway_v6 is not None

    def passes(kind: int, target: IPAddress) -> bool:
        assert thief.address_v6 is not None
        return wire.passes(frame_of(mac_of(thief), IPV6, v6(thief.address_v6, *behind(extensions, kind, target))))

    assert passes(ADVERTISEMENT, thief.address_v6)
    assert passes(ADVERTISEMENT, LINK_LOCAL)
    assert passes(SOLICITATION, neighbour.address_v6)
    for forged in (neighbour.address_v6, thief.gateway_v6):
        assert not passes(ADVERTISEMENT, forged)
    assert not passes(ROUTER, thief.address_v6)
    assert not passes(REDIRECT, thief.address_v6)


def test_more_headers_than_are_looked_at_do_not_pass(wire: Wire) -> None:
    assert wire.thief.address_v6 is not None
    many = behind([OPTIONS] * (guard.HEADERS_MAX + 1), SOLICITATION, wire.thief.address_v6)
    assert not wire.passes(frame_of(mac_of(wire.thief), IPV6, v6(wire.thief.address_v6, *many)))
    assert wire.passes(frame_of(mac_of(wire.thief), IPV6, v6(wire.thief.address_v6, FRAGMENT, bytes(16))))


def test_a_neighbours_hardware_address_and_other_protocols_do_not_pass(wire: Wire) -> None:
    thief, neighbour = wire.thief, wire.neighbour
    assert thief.address_v4 is not None
    assert not wire.passes(frame_of(mac_of(neighbour), IPV4, v4(thief.address_v4)))
    assert wire.passes(frame_of(bytes.fromhex("02eb00000001"), IPV4, v4(thief.address_v4)))
    for kind in (0x88CC, 0x8847, 0x0026):  # LLDP, MPLS, and what has a length there (a spanning tree's frame)
        assert not wire.passes(frame_of(mac_of(thief), kind, bytes(46)))


def test_without_the_guard_all_of_that_passes(wire: Wire) -> None:
    thief, neighbour = wire.thief, wire.neighbour
    assert neighbour.address_v4 is not None
    assert neighbour.address_v6 is not None
    wire.node.command("tc", "qdisc", "del", "dev", thief.veth, "clsact")
    own, advertised = mac_of(thief), (ICMP6, icmp6(ADVERTISEMENT, neighbour.address_v6))
    assert wire.passes(frame_of(own, IPV4, v4(neighbour.address_v4)))
    assert wire.passes(frame_of(own, ARP, arp(neighbour.address_v4)))
    assert wire.passes(frame_of(own, IPV6, v6(neighbour.address_v6, *advertised)))
    assert wire.passes(frame_of(mac_of(neighbour), IPV4, v4(neighbour.address_v4)))


def test_a_link_that_lost_its_guard_gets_it_again_and_a_guarded_one_nothing(node: Netns, container: Netns) -> None:
    async def twice() -> tuple[bool, bool, bool]:
        manager = await converged()
        attachment = await attach(manager, container, 0)
        first = await manager.is_damaged()
        node.command("tc", "qdisc", "del", "dev", attachment.veth, "clsact")
        second = await manager.is_damaged()
        await manager.converge()
        assert guard.name(attachment.addresses) in node.command(
            "tc", "filter", "show", "dev", attachment.veth, "ingress"
        )
        return first, second, await manager.is_damaged()

    assert node.run(twice) == (False, True, False)
