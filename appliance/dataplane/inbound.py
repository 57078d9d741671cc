"""The inbound stage: datagrams from other nodes, wire to TUN.

A batch receives up to ``limits.WIRE_BATCH`` datagrams or trains, each into a slot of its own; every segment of a
train is one packet.

1. receive    datagram or train, with its sender and segment size
2. probe      a request of another node is sent back at once, a stranger's is dropped
3. classify   exact lengths, or dropped
4. owner      a packet that a sibling owns goes to it (``dataplane`` says why), unless it has already been passed on
              once
4. merge      a segment that continues the open merge joins it, and is done
5. source     the node that sent it is the one where the packet's source is (``source``)
6. flow       an answer gets the address back that the container dialled; anything else needs a local destination
7. write      as the beginning of a new merge, or by itself; in pieces if it came in pieces
"""

import numpy as np
from numba import njit

from appliance.dataplane import (
    capture,
    error,
    flow,
    foresight,
    fragment,
    handed,
    libc,
    merge,
    misses,
    probe,
    rewrite,
    run,
    stages,
)
from appliance.dataplane.classify import ERROR, FRAGMENT, UDP, WHOLE, classify
from appliance.dataplane.decide import host_of, inbound_flow, is_local
from appliance.dataplane.memory import counters
from appliance.dataplane.native import address_of, be16, le64
from appliance.dataplane.source import check_source, is_from, is_peer
from appliance.dataplane.state import (
    CONTROL_LENGTH,
    CONTROL_WORDS,
    MSGHDR_WORDS,
    NAME_LENGTH,
    NAME_SIZE,
    RECEIVED,
    SLOT,
)
from appliance.dataplane.steering import steer
from appliance.observe.counters import COUNTS, FROM_TUN, FROM_WIRE, Count, Drop, Stage
from appliance.tables import layout
from appliance.tables.layout import HOST_LOCAL
from appliance.tables.read import find_service, hosts, in_service_range

_OK, _NOT_LOCAL, _NO_FLOW = Drop.NONE.value, Drop.NOT_LOCAL.value, Drop.ICMP_NO_FLOW.value
_MALFORMED, _NESTED, _UNKNOWN_PEER = Drop.MALFORMED.value, Drop.NESTED_OVERLAY.value, Drop.UNKNOWN_PEER.value
_READS, _PACKETS = COUNTS + Count.WIRE_READS.value, COUNTS + Count.WIRE_PACKETS.value
_BYTES, _ERRORS = COUNTS + Count.WIRE_BYTES.value, COUNTS + Count.WIRE_ERRORS.value
_HANDED = COUNTS + Count.HANDED_OVER.value
_RECEIVE, _INBOUND = Stage.RECEIVE.value, Stage.INBOUND.value
_SOL_UDP, _UDP_GRO = 17, 104
LOOPBACK_HI, LOOPBACK_LO = layout.words("127.0.0.1")


@njit
def receive(w, fd, limit):
    """Receive up to ``limit`` messages into the slots; how many there were."""
    stages.enter(w, _RECEIVE)
    messages = w.slot_messages
    for i in range(limit):
        messages[MSGHDR_WORDS * i + CONTROL_LENGTH] = 8 * CONTROL_WORDS
        messages[MSGHDR_WORDS * i + NAME_LENGTH] = NAME_SIZE
    count = libc.recvmmsg(w.libc, fd, address_of(messages, 0), limit)
    stages.enter(w, _INBOUND)
    if count < 0:
        if libc.errno(w.libc) != libc.EAGAIN:
            counters(w)[_ERRORS] += 1
        return np.int64(0)
    return count


@njit
def inbound(w, limit):
    """Take up to ``limit`` datagrams or trains from the wire; gives how many there were."""
    count = receive(w, w.state[0].wire, limit)
    if count > 1:
        _foresee(w, count)
    for i in range(count):
        train(w, i)
    merge.flush(w)
    run.flush(w)
    return count


@njit
def _foresee(w, count):
    """Have the flows of the slots' first packets in the cache when their turn comes."""
    for i in range(count):
        w.foreseen[i] = foresight.inbound(w, w.slots, i * SLOT, received(w, i))
    for i in range(count):
        if w.foreseen[i] >= 0:
            flow.approach(w, w.foreseen[i])


@njit
def received(w, slot):
    """Bytes that a slot holds."""
    return w.slot_messages[MSGHDR_WORDS * slot + RECEIVED] & 0xFFFFFFFF


@njit
def train(w, slot):
    """Handle what one slot holds."""
    length = received(w, slot)
    counters(w)[_READS] += 1
    counters(w)[_BYTES] += length
    size = _segment_size(w, slot, length)
    passed_on = is_sibling(w, slot)
    start, at = slot * SLOT, 0
    if length == 0:
        counters(w)[_PACKETS] += 1
        counters(w)[FROM_WIRE + Drop.MALFORMED.value] += 1
    while at < length:
        part = min(size, length - at)
        if probe.is_request(w, start + at, part):
            _answer(w, slot, start + at, part)
        else:
            noted = np.int64(-1)
            if w.state[0].capturing and not passed_on:
                noted = capture.arrived(w, capture.FROM_NODE, address_of(w.slots, start + at), part)
            packet(w, w.slots, start + at, part, passed_on, 0)
            if noted >= 0:
                capture.judged(w, noted)
        at += size


@njit
def _answer(w, slot, at, length):
    if is_peer(w):
        probe.answer(w, slot, at, length)
        return
    counters(w)[_PACKETS] += 1
    counters(w)[FROM_WIRE + _UNKNOWN_PEER] += 1


@njit
def _segment_size(w, slot, length):
    """Size of the segments of a train, from the UDP_GRO control message; the whole length if there is none."""
    at = CONTROL_WORDS * slot
    if w.slot_messages[MSGHDR_WORDS * slot + CONTROL_LENGTH] < 20:
        return length
    kind = w.slot_control[at + 1]
    if (kind & 0xFFFFFFFF) != _SOL_UDP or (kind >> 32) != _UDP_GRO:
        return length
    size = w.slot_control[at + 2] & 0xFFFFFFFF
    return size if 0 < size < length else length


@njit
def is_sibling(w, slot):
    """Note who sent what a slot holds; whether it was a sibling: from the loopback, from a port that only they hold."""
    at, state = NAME_SIZE * slot, w.state[0]
    state.outer_port = be16(w.slot_names, at + 2)
    state.outer_hi, state.outer_lo = le64(w.slot_names, at + 8), le64(w.slot_names, at + 16)
    if state.outer_hi != LOOPBACK_HI or state.outer_lo != LOOPBACK_LO:
        return False
    for i in range(state.workers):
        if state.outer_port == np.int64(w.handoff_ports[i]):
            return True
    return False


@njit
def packet(w, buffer, at, length, passed_on, piece):
    """Handle one packet at an offset of a buffer. ``piece``: not 0 if it was put together from pieces of this size."""
    p = w.packet[0]
    counters(w)[_PACKETS] += 1
    reason = classify(buffer, at, length, p, False)
    if reason == _OK and p.kind != WHOLE and not passed_on:
        reason = check_source(w, p)
    if reason != _OK:
        _drop(w, buffer, p, reason)
        return
    p.piece = piece
    if p.kind == FRAGMENT:
        number = fragment.collect(w, buffer, p, FROM_WIRE)
        if number < 0:
            return
        length = fragment.assemble(w, number, w.assembled, 0)
        reason = classify(w.assembled, 0, length, p, False)
        if reason == _OK and p.kind != WHOLE:
            reason = _MALFORMED  # fragments within fragments, or an ICMP error, which no path is too narrow for
        if reason != _OK:
            _drop(w, w.assembled, p, reason)
            return
        fragment.remember(w, p)
        _enter(w, w.assembled, p, passed_on)
        merge.flush(w)
        run.flush(w)
        return
    _enter(w, buffer, p, passed_on)


@njit
def _enter(w, buffer, p, passed_on):
    """Bring a good packet to its container, or to the sibling that owns its flow."""
    if p.kind == ERROR:
        deliver_error(w, buffer, p, passed_on)
        return
    if w.state[0].workers > 1 and not passed_on and not _owns(w, p):
        reason = check_source(w, p)
        if reason != _OK:
            _drop(w, buffer, p, reason)
        else:
            _hand_over(w, buffer, p)
        return
    can = p.piece == 0 and merge.can_merge(w, buffer, p)
    if can and merge.joins(w, buffer, p):
        _account(w, w.merge[0].flow, p)
        merge.join(w, buffer, p)
        return
    merge.flush(w)
    number = inbound_flow(w, p)
    if not passed_on and not (number >= 0 and is_from(w, flow.records(w)[number])):
        reason = check_source(w, p)
        if reason != _OK:
            _drop(w, buffer, p, reason)
            return
    if can:
        merge.keep_origin(w, buffer, p)
    if not _may_enter(w, p, number):
        if not _translate(w, buffer, p):
            counters(w)[FROM_WIRE + _NOT_LOCAL] += 1
            return
        if w.state[0].workers > 1 and not _owns(w, p):
            _hand_over(w, buffer, p)
            return
        number = inbound_flow(w, p)
    if number < 0 and _is_nested(w, p):
        counters(w)[FROM_WIRE + _NESTED] += 1
        return
    _account(w, number, p)
    _restore(w, buffer, p, number, False)
    if p.piece:
        fragment.write(w, buffer, p)
    elif can:
        merge.begin(w, buffer, p, number)
    else:
        merge.write_packet(w, buffer, p)


@njit
def _drop(w, buffer, p, reason):
    """Count a packet that may not pass. One of a node that nobody told us of is kept, if its sender can be asked
    for."""
    if reason == _UNKNOWN_PEER and p.kind == WHOLE and _can_ask(w, p.source_hi, p.source_lo):
        handed.describe(w, misses.FROM_NODE)
        if misses.hold(w, p.source_hi, p.source_lo, w.meta, buffer, p.at, p.length):
            return
    counters(w)[FROM_WIRE + reason] += 1


@njit
def _can_ask(w, hi, lo):
    """Whether the cluster may know more about a sender than the tables do: a ServiceIP of theirs sends nothing."""
    return in_service_range(w, hi, lo) and find_service(w, hi, lo) < 0


@njit
def _owns(w, p):
    state = w.state[0]
    owner = steer(p.destination_hi, p.destination_lo, p.source_port, p.destination_port) % state.workers
    return owner == state.index


@njit
def _hand_over(w, buffer, p):
    """Pass a packet to the sibling that owns its flow: through the tunnel port where the kernel can tell whom."""
    state = w.state[0]
    if p.extended or p.piece:
        owner = steer(p.destination_hi, p.destination_lo, p.source_port, p.destination_port) % state.workers
        handed.pass_on(w, owner, misses.FROM_NODE, buffer, p.at, p.length)
        return
    counters(w)[_HANDED] += 1
    run.prepare(w, state.handoff, LOOPBACK_HI, LOOPBACK_LO, state.port, p.length)
    run.add(w, address_of(buffer, p.at), p.length, 0, 0)


@njit
def _is_nested(w, p):
    """Whether a packet that answers no flow is one of the tunnel: a client's own port may be any, ours too."""
    return p.protocol == UDP and p.destination_port == w.state[0].port


@njit
def _may_enter(w, p, number):
    """Whether the destination is a container of this node; a flow checked against these tables knows."""
    if number >= 0 and flow.records(w)[number].epoch == w.state[0].epoch:
        return True
    return is_local(w, p.destination_hi, p.destination_lo)


@njit
def _translate(w, buffer, p):
    """Put a container's address in the place of its instance IP; False if that is none of this node's.

    A node that learned where we are from our packets knows no other address of ours.
    """
    number = host_of(w, p.destination_hi, p.destination_lo)
    if number < 0 or not hosts(w)[number].flags & HOST_LOCAL:
        return False
    rewrite.destination(buffer, p, hosts(w)[number].address_hi, hosts(w)[number].address_lo)
    return True


@njit
def _account(w, number, p):
    if number < 0:
        return
    f = flow.records(w)[number]
    f.packets_in += 1
    f.bytes_in += p.length
    flow.touch(f, False, p.tcp_flags, w.state[0].now)


@njit
def _restore(w, buffer, p, number, partial):
    """Put the dialled address back if the packet answers a flow that translates."""
    if number >= 0 and flow.records(w)[number].flags & flow.TRANSLATES:
        rewrite.inbound(buffer, p, flow.records(w)[number], partial)


@njit
def deliver_super(w, at, p, partial):
    """Deliver a packet of a container of this node, already rewritten, with the virtio header that it was read with."""
    number = inbound_flow(w, p)
    if not _may_enter(w, p, number):
        counters(w)[FROM_TUN + _NOT_LOCAL] += 1
        return
    _account(w, number, p)
    _restore(w, w.buffer, p, number, partial)
    if p.piece:
        merge.flush(w)
        fragment.write(w, w.buffer, p)
    else:
        merge.write_super(w, w.buffer, at, p)


@njit
def deliver_error(w, buffer, p, passed_on):
    """Bring an ICMP error to the container whose flow it is about, translated (``error``)."""
    number = host_of(w, p.destination_hi, p.destination_lo)
    if number < 0 or not hosts(w)[number].flags & HOST_LOCAL:
        counters(w)[FROM_WIRE + _NOT_LOCAL] += 1
        return
    local_hi, local_lo = hosts(w)[number].address_hi, hosts(w)[number].address_lo
    state = w.state[0]
    owner = steer(local_hi, local_lo, p.inner_source_port, p.inner_destination_port) % state.workers
    if owner != state.index and not passed_on:
        handed.pass_on(w, owner, misses.FROM_NODE, buffer, p.at, p.length)
        return
    if not error.is_valid(buffer, p):
        counters(w)[FROM_WIRE + _MALFORMED] += 1
        return
    number = error.find_inbound(w, p, local_hi, local_lo)
    if number < 0:
        counters(w)[FROM_WIRE + _NO_FLOW] += 1
        return
    f = flow.records(w)[number]
    source_hi, source_lo = p.source_hi, p.source_lo
    if source_lo == f.peer_lo and source_hi == f.peer_hi:
        source_hi, source_lo = f.dialled_hi, f.dialled_lo
    error.quote(w, buffer, p, f.local_hi, f.local_lo, f.dialled_hi, f.dialled_lo)
    error.readdress(buffer, p, source_hi, source_lo, f.local_hi, f.local_lo)
    merge.write_packet(w, buffer, p)
