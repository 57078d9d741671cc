"""The inbound stage: datagrams from other nodes, wire to TUN.

A batch receives up to ``limits.WIRE_BATCH`` datagrams or trains, each into a slot of its own; every segment of a
train is one packet.

1. receive    datagram or train, with its sender and segment size
2. probe      a request of another node is sent back at once
3. classify   exact lengths, or dropped
4. owner      a packet that a sibling owns goes to it (``dataplane`` says why), unless it has already been passed on
              once
5. merge      a segment that continues the open merge joins it, and is done
6. flow       an answer gets the address back that the container dialled; anything else needs a local destination
7. write      as the beginning of a new merge, or by itself
"""

import numpy as np
from numba import njit

from appliance.dataplane import flow, libc, merge, probe, rewrite, run
from appliance.dataplane.classify import classify
from appliance.dataplane.decide import inbound_flow, is_local
from appliance.dataplane.memory import counters
from appliance.dataplane.native import address_of, be16, le64
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
from appliance.observe.counters import COUNTS, FROM_TUN, FROM_WIRE, Count, Drop
from appliance.tables import layout

_OK, _NOT_LOCAL = Drop.NONE.value, Drop.NOT_LOCAL.value
_READS, _PACKETS = COUNTS + Count.WIRE_READS.value, COUNTS + Count.WIRE_PACKETS.value
_BYTES, _ERRORS = COUNTS + Count.WIRE_BYTES.value, COUNTS + Count.WIRE_ERRORS.value
_HANDED = COUNTS + Count.HANDED_OVER.value
_SOL_UDP, _UDP_GRO = 17, 104
LOOPBACK_HI, LOOPBACK_LO = layout.words("127.0.0.1")


@njit
def inbound(w, limit):
    """Take up to ``limit`` datagrams or trains from the wire; gives how many there were."""
    state, messages = w.state[0], w.slot_messages
    for i in range(limit):
        messages[MSGHDR_WORDS * i + CONTROL_LENGTH] = 8 * CONTROL_WORDS
        messages[MSGHDR_WORDS * i + NAME_LENGTH] = NAME_SIZE
    count = libc.recvmmsg(w.libc, state.wire, address_of(messages, 0), limit)
    if count < 0:
        if libc.errno(w.libc) != libc.EAGAIN:
            counters(w)[_ERRORS] += 1
        return np.int64(0)
    for i in range(count):
        train(w, i)
    merge.flush(w)
    run.flush(w)
    return count


@njit
def train(w, slot):
    """Handle what one slot holds."""
    length = w.slot_messages[MSGHDR_WORDS * slot + RECEIVED] & 0xFFFFFFFF
    counters(w)[_READS] += 1
    counters(w)[_BYTES] += length
    size = _segment_size(w, slot, length)
    passed_on = _is_handoff(w, slot)
    start, at = slot * SLOT, 0
    if length == 0:
        counters(w)[_PACKETS] += 1
        counters(w)[FROM_WIRE + Drop.MALFORMED.value] += 1
    while at < length:
        if not probe.answer(w, slot, start + at, min(size, length - at)):
            packet(w, start + at, min(size, length - at), passed_on)
        at += size


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
def _is_handoff(w, slot):
    """Whether a sibling sent this: from the loopback, and from a port that only siblings hold."""
    at = NAME_SIZE * slot
    if le64(w.slot_names, at + 8) != LOOPBACK_HI or le64(w.slot_names, at + 16) != LOOPBACK_LO:
        return False
    port = be16(w.slot_names, at + 2)
    for known in w.handoff_ports:
        if port == known:
            return True
    return False


@njit
def packet(w, at, length, passed_on):
    """Handle one packet at an offset of the receive slots."""
    p, buffer = w.packet[0], w.slots
    counters(w)[_PACKETS] += 1
    reason = classify(buffer, at, length, p, False)
    if reason != _OK:
        counters(w)[FROM_WIRE + reason] += 1
        return
    if w.state[0].workers > 1 and not passed_on and _hand_over(w, p):
        return
    can = merge.can_merge(w, buffer, p)
    if can and merge.joins(w, buffer, p):
        _account(w, w.merge[0].flow, p)
        merge.join(w, buffer, p)
        return
    merge.flush(w)
    number = inbound_flow(w, p)
    if not _may_enter(w, p, number):
        counters(w)[FROM_WIRE + _NOT_LOCAL] += 1
        return
    _account(w, number, p)
    if can:
        merge.keep_origin(w, buffer, p)
    _restore(w, buffer, p, number, False)
    if can:
        merge.begin(w, buffer, p, number)
    else:
        merge.write_packet(w, buffer, p)


@njit
def _hand_over(w, p):
    """Pass a packet to the sibling that owns its flow; False if it is our own."""
    state = w.state[0]
    owner = steer(p.destination_hi, p.destination_lo, p.source_port, p.destination_port) % state.workers
    if owner == state.index:
        return False
    counters(w)[_HANDED] += 1
    run.prepare(w, state.handoff, LOOPBACK_HI, LOOPBACK_LO, state.port, p.length)
    run.add(w, address_of(w.slots, p.at), p.length, 0, 0)
    return True


@njit
def _may_enter(w, p, number):
    """Whether the destination is a container of this node; a flow checked against these tables knows."""
    if number >= 0 and flow.records(w)[number].epoch == w.state[0].epoch:
        return True
    return is_local(w, p.destination_hi, p.destination_lo)


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
    merge.write_super(w, w.buffer, at, p)
