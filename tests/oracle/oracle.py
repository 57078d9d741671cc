"""The packet path in plain Python: the rules one after the other, and nothing of how the compiled one works.

Theory of operation. An Oracle is one worker of one node. It owns the node's view (World, never changed), what
its policies remember (Balancer), and the flows it has chosen backends for; nothing expires and nothing is full,
because a test lasts no time. A packet from a container goes through all steps, one from the underlay
through the first and the last:

    read      may it pass at all, and which part of it is what           (packet.read)
    admit     does the virtio header fit, is the source ours              (admit, _sender)
    choose    which backend, and under which name the sender appears      (_choose)
    complete  super-packets cut, partial checksums finished               (completed)
    deliver   to the underlay as datagrams, or to the TUN                 (_outbound, _deliver)

A packet that fails a step raises DropError, whose reason is counted. A super-packet counts as the packets it
stands for, once its virtio header is known to fit.

    sender a, on this node         nsA -> S          a packet read from the TUN
    underlay                       instA -> nsB      both addresses rewritten, ports never
    the answer on the underlay     instB -> nsA
    what a receives                S -> nsA          found by (nsA, instB, ports), the reverse key

Segments are never merged here: what the compiled path merges is cut again before the two are compared.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from tests.oracle import model
from tests.oracle.build import ICMP, TCP, UDP
from tests.oracle.checksum import moved, updated
from tests.oracle.model import Address, Host, Outcome, World
from tests.oracle.packet import CHECKSUM_OFFSET, DropError, Packet, read, require
from tests.oracle.policies import Balancer, Client
from tests.oracle.segment import cut, finish
from tests.oracle.virtio import GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, PLAIN, Vnet

GSO_CARRIES = {GSO_TCPV4: {(4, TCP)}, GSO_TCPV6: {(6, TCP)}, GSO_UDP_L4: {(4, UDP), (6, UDP)}}


@dataclass(frozen=True)
class FlowKey:
    """A conversation as its opener sees it: who, whom it dialled, and the ports."""

    source: Address
    dialled: Address
    ports: tuple[int, int]
    protocol: int


@dataclass(frozen=True)
class ReverseKey:
    """The same conversation as its answers show it: to whom, from which peer, and the opener's ports."""

    local: Address
    peer: Address
    ports: tuple[int, int]
    protocol: int


@dataclass
class Flows:
    """Live flows: forward to the chosen host, reverse to the address that was dialled."""

    forward: dict[FlowKey, Host] = field(default_factory=dict)
    reverse: dict[ReverseKey, Address] = field(default_factory=dict)


def wire_name(host: Host) -> Address:
    """The address under which a container appears to others: its instance IP, or its own if it has none."""
    return ip_address(host.instance_ip or host.address)


class Oracle:
    """One node's packet path; `rr_start` is the round robin position that every ServiceIP begins at."""

    def __init__(self, world: World, rr_start: int = 0) -> None:
        self._world = world
        self._hosts = {ip_address(host.address): host for host in world.hosts}
        self._services = {ip_address(service.address): service for service in world.services}
        self._ranges = [ip_network(text) for text in world.service_ranges]
        self._balancer = Balancer(rr_start)
        self._flows = Flows()

    # -- the two entries --

    def from_tun(self, vnet: bytes, packet: bytes) -> Outcome:
        """One read from the TUN: a packet or super-packet that a container of this node sends."""
        outcome = Outcome()
        header = Vnet.unpack(vnet)
        with counting(outcome):
            admitted = admit(header, packet)
            with counting(outcome, stands_for(header, admitted)):
                self._outbound(header, admitted, outcome)
        return outcome

    def from_wire(self, source: tuple[str, int], payload: bytes, segment: int = 0) -> Outcome:
        """One read from the underlay: a datagram, or with `segment` a train; any source is accepted."""
        outcome = Outcome()
        size = segment or max(len(payload), 1)
        for start in range(0, max(len(payload), 1), size):
            with counting(outcome):
                self._deliver(read(payload[start : start + size]), outcome)
        return outcome

    # -- from a container --

    def _outbound(self, vnet: Vnet, packet: Packet, outcome: Outcome) -> None:
        sender = self._sender(packet)
        host, source, destination = self._choose(packet, sender)
        rewritten = rewrite(packet, source, destination, partial=is_partial(vnet, packet))
        for piece in completed(vnet, rewritten):
            if self._is_local(host):
                self._deliver(read(piece), outcome)
            else:
                outcome.wire.append((str(ip_address(host.node)), host.port, piece))

    def _sender(self, packet: Packet) -> Host:
        """The container of this node that the packet's source belongs to."""
        sender = self._hosts.get(packet.source)
        if sender is None or not self._is_local(sender):
            raise DropError(model.SPOOFED_SOURCE)
        return sender

    def _is_local(self, host: Host) -> bool:
        return (ip_address(host.node), host.port) == (ip_address(self._world.node), self._world.port)

    # -- where to --

    def _choose(self, packet: Packet, sender: Host) -> tuple[Host, Address, Address]:
        """(host, source, destination): where the packet goes and which addresses it has on the way."""
        dialled = packet.destination
        if dialled in self._services:
            host = self._backend(packet, sender)
            return host, wire_name(sender), ip_address(host.address)
        if dialled in self._hosts:
            # A conversation without translation is a flow too: no later one may rename its answers.
            direct = ReverseKey(packet.source, dialled, packet.ports, packet.protocol)
            self._flows.reverse.setdefault(direct, dialled)
            self._remember(FlowKey(packet.source, dialled, packet.ports, packet.protocol), self._hosts[dialled])
            return self._hosts[dialled], packet.source, dialled
        in_range = any(dialled in network for network in self._ranges)
        raise DropError(model.UNKNOWN_SERVICE if in_range else model.NO_ROUTE)

    def _backend(self, packet: Packet, sender: Host) -> Host:
        """The flow's backend; a new flow takes the next that is known and whose answers can be told apart."""
        key = FlowKey(packet.source, packet.destination, packet.ports, packet.protocol)
        if key in self._flows.forward:
            return self._flows.forward[key]
        service, client = self._services[packet.destination], Client(packet.source, packet.ports[0])
        reason = model.NO_INSTANCE
        for address in self._balancer.order(service, client, self._hosts):
            if address not in self._hosts:
                continue
            reason, host = model.REVERSE_IN_USE, self._hosts[address]
            reverse = ReverseKey(packet.source, wire_name(host), packet.ports, packet.protocol)
            if reverse not in self._flows.reverse:
                self._remember(key, host)
                self._flows.reverse[reverse] = packet.destination
                self._balancer.opened(service, client, self._hosts, address)
                return host
        raise DropError(reason)

    def _remember(self, key: FlowKey, host: Host) -> None:
        """A flow to a host, counted once."""
        if key not in self._flows.forward:
            self._flows.forward[key] = host
            self._balancer.flows[ip_address(host.address)] += 1

    # -- to a container --

    def _deliver(self, packet: Packet, outcome: Outcome) -> None:
        """Into the TUN: an answer comes from the address that was dialled, everything else as it is."""
        host = self._hosts.get(packet.destination)
        if host is None or not self._is_local(host):
            raise DropError(model.NOT_LOCAL)
        outcome.tun.append((PLAIN, rewrite(packet, self._dialled(packet), packet.destination).data))

    def _dialled(self, packet: Packet) -> Address:
        """The address that the receiver dialled, if this is an answer; else the source."""
        sport, dport = packet.ports
        key = ReverseKey(packet.destination, packet.source, (dport, sport), packet.protocol)
        return self._flows.reverse.get(key, packet.source)


@contextmanager
def counting(outcome: Outcome, packets: int = 1) -> Iterator[None]:
    """Handle one packet, or what stands for several; if it is dropped, the outcome says why."""
    try:
        yield
    except DropError as drop:
        outcome.drops[drop.reason] = outcome.drops.get(drop.reason, 0) + packets


# -- the packet's bytes --


def admit(vnet: Vnet, data: bytes) -> Packet:
    """A packet from a container and the virtio header that fits it, or DropError."""
    packet = read(data, super_udp=vnet.gso_kind == GSO_UDP_L4)
    if vnet.gso_kind != GSO_NONE:
        fits = (packet.version, packet.protocol) in GSO_CARRIES.get(vnet.gso_kind, set())
        require(fits and vnet.gso_size > 0, model.MALFORMED)
    if vnet.needs_csum:
        field = vnet.csum_start + vnet.csum_offset
        # Written after the packet was judged, it may not change what was judged: addresses, ports, lengths.
        beside = vnet.csum_start >= packet.l4 and field >= packet.payload_at
        require(field + 2 <= len(data) and (beside or is_partial(vnet, packet)), model.MALFORMED)
    return packet


def stands_for(vnet: Vnet, packet: Packet) -> int:
    """How many packets it is on the underlay."""
    if vnet.gso_kind == GSO_NONE:
        return 1
    return max(1, -(-len(packet.payload) // vnet.gso_size))


def is_partial(vnet: Vnet, packet: Packet) -> bool:
    """The transport checksum field holds the pseudo-header's sum and waits to be finished."""
    expected = packet.l4, CHECKSUM_OFFSET[packet.protocol]
    return vnet.needs_csum and (vnet.csum_start, vnet.csum_offset) == expected


def rewrite(packet: Packet, source: Address, destination: Address, partial: bool = False) -> Packet:
    """The packet with other addresses and every checksum that covers them as right or as wrong as before."""
    if (source, destination) == (packet.source, packet.destination):
        return packet
    old, new = packet.source.packed + packet.destination.packed, source.packed + destination.packed
    data = bytearray(packet.data)
    addresses_at = 12 if packet.version == 4 else 8
    data[addresses_at : addresses_at + len(new)] = new
    if packet.version == 4:
        struct.pack_into("!H", data, 10, updated(packet.u16(10), old, new))
    struct.pack_into("!H", data, packet.checksum_at, _transport_field(packet, old, new, partial))
    return Packet(bytes(data), packet.l4, packet.protocol)


def _transport_field(packet: Packet, old: bytes, new: bytes, partial: bool) -> int:
    """The transport checksum field after the addresses in the pseudo-header have changed."""
    now = packet.u16(packet.checksum_at)
    if packet.protocol == ICMP:  # over IPv4 it has no pseudo-header
        return now
    if partial:
        return moved(now, old, new)
    if not packet.has_checksum:
        return 0
    field = updated(now, old, new)
    return 0xFFFF if packet.protocol == UDP and field == 0 else field


def completed(vnet: Vnet, packet: Packet) -> list[bytes]:
    """What goes on: the pieces of a super-packet, or the packet with its checksum finished."""
    if vnet.gso_kind != GSO_NONE:
        return cut(packet, vnet.gso_size)
    if vnet.needs_csum:
        return [finish(packet.data, vnet.csum_start, vnet.csum_offset)]
    return [packet.data]
