"""The packet path in plain Python: the rules one after the other, and nothing of how the compiled one works.

Theory of operation. An Oracle is one worker of one node. It owns the node's view (World), a round robin position a
ServiceIP, the conversations that it has decided where to send (Flows), the packets that wait until an address is
known, the pieces of unfinished datagrams, and where senders were last heard from. Time stands still but for
``later``; no flow expires and no table is full. A packet from a container goes through

    read      may it pass at all, and which part of it is what            (packet.read)
    admit     does the virtio header fit                                  (admit)
    whole     fragments wait until their datagram is whole                (fragments)
    choose    is the source ours, which backend, under which name         (_choose)
    fit       does the path take it, is a TCP opening told so             (_fit)
    complete  super-packets cut, partial checksums finished               (completed)
    deliver   to the underlay as datagrams, or to the TUN                 (_outbound, _deliver)

and one from the underlay through read, whole, then

    believe   may the node that sent it speak for the packet's source     (peers)
    deliver   to the TUN, if it is for a container of this node           (_deliver)

A packet that fails a step raises DropError, whose reason is counted. A super-packet counts as the packets it
stands for, once its virtio header is known to fit.

    sender a, on this node         nsA -> S          a packet read from the TUN
    underlay                       instA -> nsB      both addresses rewritten, ports never
    the answer on the underlay     instB -> nsA
    what a receives                S -> nsA          found by (nsA, instB, ports), the reverse key

An ICMP error about any of these quotes it as it was in that row, and is translated to the row where it goes.

Segments are never merged here: what the compiled path merges is cut again before the two are compared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network

from tests.oracle import fragments, model
from tests.oracle.build import ACK, FIN, ICMP, RST, SYN, TCP, UDP, UDP_LITE
from tests.oracle.checksum import moved, updated
from tests.oracle.errors import readdressed, requoted
from tests.oracle.fragments import Collector, Pieces
from tests.oracle.model import Address, Host, Outcome, World
from tests.oracle.packet import CHECKSUM_OFFSET, ERROR, FRAGMENT, DropError, Packet, read, require
from tests.oracle.peers import Peers, hosted, wire_name
from tests.oracle.policies import Balancer, Client, weighted
from tests.oracle.replies import Replies
from tests.oracle.segment import clamped, cut, finish
from tests.oracle.virtio import GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, PLAIN, Vnet

GSO_CARRIES = {GSO_TCPV4: {(4, TCP)}, GSO_TCPV6: {(6, TCP)}, GSO_UDP_L4: {(4, UDP), (6, UDP)}}

SECOND = 1_000_000_000
START = 1_000 * SECOND
HELD_EACH, HELD_FOR, REFUSED_FOR = 64, 5 * SECOND, SECOND

Outer = tuple[str, int]  # address and port that a datagram came from


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
class Flow:
    """Where a conversation goes: the addresses on the wire, from whom answers come, and the node.

    `learned`: no table has the dialled address, only its node is known, and translates it. `lives` are those of the
    two containers: an address that gets another container has another one. `epoch`: of the tables it was compared with.
    `closing`: an end of it has said that a TCP connection is over.
    """

    source: Address
    target: Address
    peer: Address
    node: tuple[Address, int]
    local: bool
    lives: tuple[int, int]
    epoch: int
    learned: bool = False
    closing: bool = False


@dataclass
class Flows:
    """Live flows: forward to the chosen host, reverse to the address that was dialled, and all of what was decided."""

    forward: dict[FlowKey, Host] = field(default_factory=dict)
    reverse: dict[ReverseKey, Address] = field(default_factory=dict)
    decided: dict[FlowKey, Flow] = field(default_factory=dict)

    def answered_by(self, local: Address, peer: Address, ports: tuple[int, int], protocol: int) -> FlowKey | None:
        """The conversation of a container in which a peer answers; ports as its opener sees them."""
        dialled = self.reverse.get(ReverseKey(local, peer, ports, protocol))
        return None if dialled is None else FlowKey(local, dialled, ports, protocol)

    def forget(self, key: FlowKey) -> None:
        """End a conversation."""
        flow = self.decided.pop(key)
        self.forward.pop(key, None)
        reverse = ReverseKey(key.source, flow.peer, key.ports, key.protocol)
        if self.reverse.get(reverse) == key.dialled:
            del self.reverse[reverse]


@dataclass
class Waiting:
    """Packets for, or from, an address that may become known; or, if it was refused, for how long it stays so."""

    deadline: int
    from_wire: bool = False  # what waits came from there, and does not go there
    packets: list[Held] = field(default_factory=list)
    refused: bool = False


@dataclass(frozen=True)
class Held:
    """A packet that waits: what goes on with it, and how it is given up."""

    go_on: Callable[[Outcome], None]
    give_up: Callable[[Outcome], None]


class Oracle:
    """One node's packet path; `rr_start` is the round robin position that every ServiceIP begins at."""

    def __init__(self, world: World, rr_start: int = 0) -> None:
        self._balancer = Balancer(rr_start)
        self._flows = Flows()
        self._world, self._now, self._epoch = world, START, 0
        self._lives: dict[Address, tuple[int, str | None]] = {}
        self._waiting: dict[Address, Waiting] = {}
        self._refusals: list[Address] = []
        self._collector = Collector()
        self._replies = Replies(world.gateways)
        self._peers = Peers(world)
        self.learn(world)

    # -- what happens to it --

    def learn(self, world: World) -> None:
        """The tables are these from now on; the same once more is no other epoch."""
        self._epoch += self._epoch == 0 or world != self._world
        self._world = world
        self._hosts = {ip_address(host.address): host for host in world.hosts}
        self._services = {ip_address(service.address): service for service in world.services}
        self._ranges = [ip_network(text) for text in world.service_ranges]
        self._peers.learn(world)
        known = {address: life for address, life in self._lives.items() if address in self._hosts}
        for address, host in self._hosts.items():
            if address not in known or known[address][1] != host.instance_ip:
                known[address] = (self._epoch, host.instance_ip)
        self._lives = known

    def refuse(self, address: str) -> None:
        """Nobody has this address."""
        self._refusals.append(ip_address(address))

    def later(self, seconds: float) -> None:
        """So much time passes."""
        self._now += round(seconds * SECOND)

    def run(self) -> Outcome:
        """What comes of what has happened: packets that waited go on or are given up."""
        outcome = Outcome()
        for address in self._refusals:
            if self._is_waited_for(address) and not self._is_known(address):
                self._give_up(self._waiting[address], outcome)
        self._refusals.clear()
        self._go_on(outcome)
        for address, waiting in list(self._waiting.items()):
            if waiting.deadline <= self._now and waiting.refused:
                del self._waiting[address]
            elif waiting.deadline <= self._now:
                self._give_up(waiting, outcome)
        late = self._collector.expire(self._now)
        if late:
            outcome.drops[model.FRAGMENT_TIMEOUT] = late
        return outcome

    # -- the two entries --

    def from_tun(self, vnet: bytes, packet: bytes) -> Outcome:
        """One read from the TUN: a packet or super-packet that a container of this node sends."""
        outcome = Outcome()
        header = Vnet.unpack(vnet)
        with counting(outcome):
            admitted = admit(header, packet)
            with counting(outcome, stands_for(header, admitted)):
                self._from_container(header, admitted, outcome)
        return outcome

    def from_wire(self, source: Outer, payload: bytes, segment: int = 0) -> Outcome:
        """One read from the underlay: a datagram, or with `segment` a train."""
        outcome = Outcome()
        size = segment or max(len(payload), 1)
        for start in range(0, max(len(payload), 1), size):
            with counting(outcome):
                self._from_node(source, read(payload[start : start + size]), outcome)
        self._go_on(outcome)
        return outcome

    # -- what waits --

    def _is_known(self, address: Address) -> bool:
        """The tables have it; or it was heard from, and its node translates what is sent to it."""
        if address in self._services or address in self._hosts:
            return True
        heard = self._peers.heard_from(address, self._now)
        return heard is not None and heard.ours and not self._waiting[address].from_wire

    def _go_on(self, outcome: Outcome) -> None:
        """What waited for an address that is known now."""
        for address, waiting in list(self._waiting.items()):
            if not waiting.refused and self._is_known(address):
                del self._waiting[address]
                for held in waiting.packets:
                    held.go_on(outcome)

    def _is_waited_for(self, address: Address) -> bool:
        return address in self._waiting and not self._waiting[address].refused

    def _hold(self, address: Address, held: Held, *, from_wire: bool = False) -> bool:
        """Let a packet wait for an address; False if it may not."""
        waiting = self._waiting.get(address)
        if waiting is None or (waiting.refused and waiting.deadline <= self._now):
            waiting = self._waiting[address] = Waiting(self._now + HELD_FOR, from_wire)
        if waiting.refused or len(waiting.packets) >= HELD_EACH:
            return False
        waiting.packets.append(held)
        return True

    def _give_up(self, waiting: Waiting, outcome: Outcome) -> None:
        packets, waiting.packets = waiting.packets, []
        waiting.refused, waiting.deadline = True, self._now + REFUSED_FOR
        for held in packets:
            held.give_up(outcome)

    # -- from a container --

    def _from_container(self, vnet: Vnet, packet: Packet, outcome: Outcome) -> None:
        if packet.kind == FRAGMENT:
            require(self._is_local(self._hosts.get(packet.source)), model.SPOOFED_SOURCE)
            whole = self._collector.add("tun", packet, self._now)
            if whole is not None:
                self._outbound(vnet, *whole, outcome)
        elif packet.kind == ERROR:
            self._error_outbound(vnet, packet, outcome)
        else:
            self._outbound(vnet, packet, None, outcome)

    def _outbound(self, vnet: Vnet, packet: Packet, came: Pieces | None, outcome: Outcome) -> None:
        """Send a packet on, let it wait, or tell its sender that it cannot go."""
        try:
            flow = self._choose(packet)
        except DropError as drop:
            self._refused(vnet, packet, came, drop, outcome)
            return
        packet = self._fit(vnet, packet, came, flow, outcome)
        self._note(flow, packet)
        rewritten = rewrite(packet, flow.source, flow.target, partial=is_partial(vnet, packet))
        for piece in completed(vnet, rewritten):
            if flow.local:
                self._deliver(read(piece), came, outcome)
            else:
                outcome.wire += [(*named(flow.node), part) for part in in_pieces(piece, came)]

    def _refused(self, vnet: Vnet, packet: Packet, came: Pieces | None, drop: DropError, outcome: Outcome) -> None:
        """No flow takes the packet."""
        if drop.reason == model.UNKNOWN_SERVICE:
            held = Held(
                lambda later: self._again(vnet, packet, came, later),
                lambda later: self._unreachable(vnet, packet, DropError(model.UNKNOWN_SERVICE), later),
            )
            if self._hold(packet.destination, held):
                return
        self._unreachable(vnet, packet, drop, outcome)

    def _again(self, vnet: Vnet, packet: Packet, came: Pieces | None, outcome: Outcome) -> None:
        with counting(outcome, stands_for(vnet, packet)):
            self._outbound(vnet, packet, came, outcome)

    def _unreachable(self, vnet: Vnet, packet: Packet, drop: DropError, outcome: Outcome) -> None:
        """Count a packet, and tell its sender that nobody is there."""
        with counting(outcome, stands_for(vnet, packet)):
            if drop.reason != model.SPOOFED_SOURCE:
                outcome.tun += [(PLAIN, reply) for reply in self._replies.unreachable(packet, self._now)]
            raise drop

    def _fit(self, vnet: Vnet, packet: Packet, came: Pieces | None, flow: Flow, outcome: Outcome) -> Packet:
        """The packet as the path to its node takes it; DropError if that does not, and the sender is told."""
        mtu = None if flow.local else self._peers.path_mtu(flow.node[0])
        if mtu is None:
            return packet
        if packet.protocol == TCP and packet.u8(packet.l4 + 13) & SYN:
            packet = clamped(packet, mtu - packet.l4 - 20, is_partial(vnet, packet))
        size = came.largest if came else len(packet.data)
        if vnet.gso_kind != GSO_NONE:
            size = min(size, packet.payload_at + vnet.gso_size)
        must_fit = packet.dont_fragment if packet.version == 4 else size > 1280
        if size > mtu and must_fit:
            outcome.tun += [(PLAIN, reply) for reply in self._replies.too_big(packet, mtu, self._now)]
            raise DropError(model.TOO_BIG)
        return packet

    def _sender(self, packet: Packet) -> Host:
        """The container of this node that the packet's source belongs to."""
        sender = self._hosts.get(packet.source)
        if sender is None or not self._is_local(sender):
            raise DropError(model.SPOOFED_SOURCE)
        return sender

    def _is_local(self, host: Host | None) -> bool:
        return host is not None and node_of(host) == (ip_address(self._world.node), self._world.port)

    # -- where to --

    def _choose(self, packet: Packet) -> Flow:
        """Where a packet goes: as its conversation has always gone, unless its containers are gone."""
        key = FlowKey(packet.source, packet.destination, packet.ports, packet.protocol)
        if key in self._flows.decided and (self._is_reopened(key, packet) or not self._is_current(key)):
            self._forget(key)
        if key not in self._flows.decided:
            self._flows.decided[key] = self._decide(packet)
        return self._flows.decided[key]

    def _is_reopened(self, key: FlowKey, packet: Packet) -> bool:
        """A connection that was over, from the same port once more: it is another one."""
        return self._flows.decided[key].closing and _tcp_flags(packet) & (SYN | ACK) == SYN

    def _note(self, flow: Flow, packet: Packet) -> None:
        """What a packet says of its connection."""
        flags = _tcp_flags(packet)
        if flags & (FIN | RST):
            flow.closing = True
        elif flags & SYN:
            flow.closing = False

    def _is_current(self, key: FlowKey) -> bool:
        """Compare a flow with the tables, and bring its node up to date; False if one of its ends is gone."""
        flow = self._flows.decided[key]
        if flow.epoch == self._epoch:
            return True
        if not self._is_local(self._hosts.get(key.source)) or self._life(key.source) != flow.lives[0]:
            return False
        if flow.learned:
            heard = self._peers.heard_from(key.dialled, self._now)
            flow.node = (heard.node, heard.port) if heard else flow.node
            flow.epoch = self._epoch
            return key.dialled not in self._services
        host = self._hosts.get(flow.target)
        if host is None or self._life(flow.target) != flow.lives[1]:
            return False
        if not self._is_offered(key, flow):
            return False
        flow.node, flow.local, flow.epoch = node_of(host), self._is_local(host), self._epoch
        return True

    def _is_offered(self, key: FlowKey, flow: Flow) -> bool:
        """Whether the ServiceIP still gives the flow's backend to anybody; a TCP connection stays all the same."""
        if key.protocol == TCP or key.dialled == flow.target:
            return True
        service = self._services.get(key.dialled)
        return service is not None and flow.target in (address for address, _ in weighted(service))

    def _life(self, address: Address) -> int:
        return self._lives[address][0] if address in self._lives else 0

    def _decide(self, packet: Packet) -> Flow:
        """Where a new conversation goes, and which addresses it has on the way."""
        sender, dialled = self._sender(packet), packet.destination
        require(not self._is_waited_for(dialled), model.UNKNOWN_SERVICE)
        if dialled in self._services:
            host = self._backend(packet, sender)
            return self._flow_to(host, packet, wire_name(sender), wire_name(host))
        if dialled in self._hosts:
            # A conversation without translation is a flow too: no later one may rename its answers.
            direct = ReverseKey(packet.source, dialled, packet.ports, packet.protocol)
            self._flows.reverse.setdefault(direct, dialled)
            self._remember(FlowKey(packet.source, dialled, packet.ports, packet.protocol), self._hosts[dialled])
            return self._flow_to(self._hosts[dialled], packet, packet.source, dialled)
        require(any(dialled in network for network in self._ranges), model.NO_ROUTE)
        return self._flow_to_learned(packet, sender)

    def _flow_to(self, host: Host, packet: Packet, source: Address, peer: Address) -> Flow:
        target = ip_address(host.address)
        lives = self._life(packet.source), self._life(target)
        return Flow(source, target, peer, node_of(host), self._is_local(host), lives, self._epoch)

    def _flow_to_learned(self, packet: Packet, sender: Host) -> Flow:
        """A conversation with one that was heard from: to its node, which translates an instance IP by itself."""
        dialled = packet.destination
        heard = self._peers.heard_from(dialled, self._now)
        if heard is None or not heard.ours:
            raise DropError(model.UNKNOWN_SERVICE)
        self._flows.reverse.setdefault(ReverseKey(packet.source, dialled, packet.ports, packet.protocol), dialled)
        lives = self._life(packet.source), 0
        node = heard.node, heard.port
        return Flow(wire_name(sender), dialled, dialled, node, False, lives, self._epoch, learned=True)

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

    def _forget(self, key: FlowKey) -> None:
        host = self._flows.forward.get(key)
        if host is not None:
            self._balancer.flows[ip_address(host.address)] -= 1
        self._flows.forget(key)

    def _remember(self, key: FlowKey, host: Host) -> None:
        """A flow to a host, counted once."""
        if key not in self._flows.forward:
            self._flows.forward[key] = host
            self._balancer.flows[ip_address(host.address)] += 1

    # -- from a node --

    def _from_node(self, outer: Outer, packet: Packet, outcome: Outcome) -> None:
        if packet.kind == FRAGMENT:
            self._peers.believe(outer, packet.source, self._now)
            whole = self._collector.add("wire", packet, self._now)
            if whole is not None:
                self._inbound(outer, *whole, outcome)
        elif packet.kind == ERROR:
            self._peers.believe(outer, packet.source, self._now)
            self._error_inbound(packet, outcome)
        else:
            self._inbound(outer, packet, None, outcome)

    def _inbound(self, outer: Outer, packet: Packet, came: Pieces | None, outcome: Outcome) -> None:
        if not self._answers(outer, packet):
            try:
                self._peers.believe(outer, packet.source, self._now)
            except DropError as drop:
                if drop.reason == model.UNKNOWN_PEER and self._ask_for_sender(outer, packet):
                    return
                raise
        packet = self._to_container(packet)
        is_tunnel = packet.protocol == UDP and packet.ports[1] == self._world.port
        require(not is_tunnel or self._conversation(packet) is not None, model.NESTED_OVERLAY)
        self._deliver(packet, came, outcome)

    def _ask_for_sender(self, outer: Outer, packet: Packet) -> bool:
        """Let a packet of an unknown node wait, if the cluster can be asked where its sender is."""
        source = packet.source
        if source in self._services or not any(source in network for network in self._ranges):
            return False
        return self._hold(
            source,
            Held(
                lambda later: self._inbound_again(outer, packet, later),
                lambda later: count(later, model.UNKNOWN_PEER),
            ),
            from_wire=True,
        )

    def _inbound_again(self, outer: Outer, packet: Packet, outcome: Outcome) -> None:
        with counting(outcome):
            self._inbound(outer, packet, None, outcome)

    def _answers(self, outer: Outer, packet: Packet) -> bool:
        """Whether it is an answer of a conversation, from the very node that this goes to."""
        key = self._conversation(packet)
        if key is None:
            return False
        flow = self._flows.decided[key]
        return flow.epoch == self._epoch and not flow.local and flow.node[0] == ip_address(outer[0])

    def _conversation(self, packet: Packet) -> FlowKey | None:
        """The conversation that a packet for a container answers."""
        sport, dport = packet.ports
        return self._flows.answered_by(packet.destination, packet.source, (dport, sport), packet.protocol)

    def _to_container(self, packet: Packet) -> Packet:
        """A packet for an instance IP of this node is for its container: who learned of it knows no other address."""
        host = hosted(packet.destination, self._hosts, self._services)
        if host is None or not self._is_local(host):
            raise DropError(model.NOT_LOCAL)
        return rewrite(packet, packet.source, ip_address(host.address))

    # -- to a container --

    def _deliver(self, packet: Packet, came: Pieces | None, outcome: Outcome) -> None:
        """Into the TUN: an answer comes from the address that was dialled, everything else as it is."""
        require(self._is_local(self._hosts.get(packet.destination)), model.NOT_LOCAL)
        key = self._conversation(packet)
        if key is not None:
            self._note(self._flows.decided[key], packet)
        translated = rewrite(packet, self._dialled(packet), packet.destination)
        outcome.tun += [(PLAIN, piece) for piece in in_pieces(translated.data, came)]

    def _dialled(self, packet: Packet) -> Address:
        """The address that the receiver dialled, if this is an answer; else the source."""
        key = self._conversation(packet)
        return packet.source if key is None else key.dialled

    # -- ICMP errors --

    def _error_outbound(self, vnet: Vnet, packet: Packet, outcome: Outcome) -> None:
        """From a container, or the node itself, about a packet that reached, or should have reached, a container."""
        packet = read(completed(vnet, packet)[0])
        require(packet.transport_valid, model.MALFORMED)
        quoted = packet.quoted
        if packet.source != quoted.destination and str(packet.source) not in self._world.gateways:
            ours = self._is_local(self._hosts.get(packet.source))
            raise DropError(model.ICMP_NO_FLOW if ours else model.SPOOFED_SOURCE)
        require(self._is_local(self._hosts.get(quoted.destination)), model.SPOOFED_SOURCE)
        sport, dport = quoted.ports
        key = FlowKey(quoted.destination, quoted.source, (dport, sport), quoted.protocol)
        if key in self._flows.decided and self._is_current(key):
            self._error_in_flow(packet, self._flows.decided[key], outcome)
        else:
            self._error_to_sender(packet, outcome)

    def _error_in_flow(self, packet: Packet, flow: Flow, outcome: Outcome) -> None:
        """About an answer of a conversation that this side opened: quoted as it was on the wire."""
        quote = requoted(packet.quoted, flow.peer, packet.quoted.destination)
        source = self._name(packet.source) if flow.source != packet.source else flow.source
        error = readdressed(packet, source, flow.target, quote)
        self._send_error(error, flow.node, flow.local, outcome)

    def _error_to_sender(self, packet: Packet, outcome: Outcome) -> None:
        """About a packet that the other side opened a conversation with: the quote is as on the wire already."""
        host = hosted(packet.destination, self._hosts, self._services)
        if host is not None:
            target = ip_address(host.address)
            source = packet.source if target == packet.destination else self._name(packet.source)
            error = readdressed(packet, source, target, packet.quoted.data)
            self._send_error(error, node_of(host), self._is_local(host), outcome)
            return
        heard = self._peers.heard_from(packet.destination, self._now)
        if heard is None or not heard.ours:
            raise DropError(model.ICMP_NO_FLOW)
        error = readdressed(packet, self._name(packet.source), packet.destination, packet.quoted.data)
        self._send_error(error, (heard.node, heard.port), False, outcome)

    def _name(self, address: Address) -> Address:
        """The address under which a container appears to others, or the node's own as it is."""
        return wire_name(self._hosts[address]) if address in self._hosts else address

    def _send_error(self, error: bytes, node: tuple[Address, int], local: bool, outcome: Outcome) -> None:
        if local:
            self._error_inbound(read(error), outcome)
        else:
            outcome.wire.append((*named(node), error))

    def _error_inbound(self, packet: Packet, outcome: Outcome) -> None:
        """To a container, if it is about a packet of a conversation of its own."""
        host = hosted(packet.destination, self._hosts, self._services)
        if host is None or not self._is_local(host):
            raise DropError(model.NOT_LOCAL)
        require(packet.transport_valid, model.MALFORMED)
        local, quoted = ip_address(host.address), packet.quoted
        key = self._complained_of(local, packet)
        if key is None:
            raise DropError(model.ICMP_NO_FLOW)
        flow = self._flows.decided[key]
        source = key.dialled if packet.source == flow.peer else packet.source
        quote = requoted(quoted, local, key.dialled)
        outcome.tun.append((PLAIN, readdressed(packet, source, local, quote)))

    def _complained_of(self, local: Address, packet: Packet) -> FlowKey | None:
        """The conversation of a container that sent the quoted packet, just as it is quoted."""
        quoted = packet.quoted
        peers = [quoted.destination]
        if quoted.destination in self._hosts:
            peers.append(wire_name(self._hosts[quoted.destination]))
        for peer in peers:
            key = self._flows.answered_by(local, peer, quoted.ports, quoted.protocol)
            if key is not None:
                flow = self._flows.decided[key]
                if (flow.source, flow.target) == (quoted.source, quoted.destination):
                    return key
        return None


def _tcp_flags(packet: Packet) -> int:
    return packet.u8(packet.l4 + 13) if packet.protocol == TCP else 0


def named(node: tuple[Address, int]) -> tuple[str, int]:
    """A node as an outcome has it."""
    return str(node[0]), node[1]


def node_of(host: Host) -> tuple[Address, int]:
    """Where a container's node is on the underlay."""
    return ip_address(host.node), host.port


def in_pieces(data: bytes, came: Pieces | None) -> list[bytes]:
    """A packet as it leaves: whole, or in pieces if it came in pieces."""
    return [data] if came is None else fragments.cut(read(data), came)


@contextmanager
def counting(outcome: Outcome, packets: int = 1) -> Iterator[None]:
    """Handle one packet, or what stands for several; if it is dropped, the outcome says why."""
    try:
        yield
    except DropError as drop:
        count(outcome, drop.reason, packets * drop.packets)


def count(outcome: Outcome, reason: str, packets: int = 1) -> None:
    """Note a drop."""
    outcome.drops[reason] = outcome.drops.get(reason, 0) + packets


# -- the packet's bytes --


def admit(vnet: Vnet, data: bytes) -> Packet:
    """A packet from a container and the virtio header that fits it, or DropError."""
    packet = read(data, super_udp=vnet.gso_kind == GSO_UDP_L4)
    if packet.kind == FRAGMENT:
        require(vnet.gso_kind == GSO_NONE and not vnet.needs_csum, model.MALFORMED)
        return packet
    if vnet.gso_kind != GSO_NONE:
        require(not packet.is_extended, model.MALFORMED)
        fits = (packet.version, packet.protocol) in GSO_CARRIES.get(vnet.gso_kind, set())
        require(fits and vnet.gso_size > 0, model.MALFORMED)
    if vnet.needs_csum:
        field = vnet.csum_start + vnet.csum_offset
        # Written after the packet was judged, it may not change what was judged: addresses, ports, lengths.
        beside = vnet.csum_start >= packet.l4 and field >= packet.payload_at and packet.kind != ERROR
        require(field + 2 <= len(data) and (beside or is_partial(vnet, packet)), model.MALFORMED)
    return packet


def stands_for(vnet: Vnet, packet: Packet) -> int:
    """How many packets it is on the underlay."""
    if vnet.gso_kind == GSO_NONE:
        return 1
    return max(1, -(-len(packet.payload) // vnet.gso_size))


def is_partial(vnet: Vnet, packet: Packet) -> bool:
    """The transport checksum field holds the pseudo-header's sum and waits to be finished."""
    expected = packet.l4, CHECKSUM_OFFSET.get(packet.protocol)
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
    if packet.checksum_at is not None:
        field = _transport_field(packet, packet.checksum_at, old, new, partial)
        struct.pack_into("!H", data, packet.checksum_at, field)
    return replace(packet, data=bytes(data))


def _transport_field(packet: Packet, at: int, old: bytes, new: bytes, partial: bool) -> int:
    """The transport checksum field after the addresses in the pseudo-header have changed."""
    now = packet.u16(at)
    if packet.protocol == ICMP:  # over IPv4 it has no pseudo-header
        return now
    if partial:
        return moved(now, old, new)
    distinct = packet.protocol in (UDP, UDP_LITE)  # RFC 768, RFC 3828 section 3.1: 0 is none
    if distinct and now == 0:
        return 0
    field = updated(now, old, new)
    return 0xFFFF if distinct and field == 0 else field


def completed(vnet: Vnet, packet: Packet) -> list[bytes]:
    """What goes on: the pieces of a super-packet, or the packet with its checksum finished."""
    if vnet.gso_kind != GSO_NONE:
        return cut(packet, vnet.gso_size)
    if vnet.needs_csum:
        return [finish(packet.data, vnet.csum_start, vnet.csum_offset)]
    return [packet.data]
