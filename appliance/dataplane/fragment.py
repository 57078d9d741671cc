"""Fragments (RFC 791 section 3.2, RFC 8200 section 4.5): put together, judged as a whole, and sent on in pieces again.

Theory of operation
-------------------
Only the first fragment of a datagram has ports, so the fragments of one flow and its whole packets may reach different
workers, and no fragment but the first tells its flow. All fragments of a datagram do reach one worker (the steering
hash takes their ports as none). It collects them here; the datagram then goes to the worker that owns its flow, is
treated like any packet, and leaves in pieces not larger than those that it came in, with the identification that it
had. So a receiver sees what it would have seen on a plain network, and nothing that overlaps.

Owned by the worker, in its private memory: ``limits.FRAGMENTED`` collections, each with room for a whole datagram. A
source may use a quarter of them. A datagram whose fragments overlap, disagree about its end, or are too many is given
up, and what comes of it later is dropped too (RFC 5722). One that is not whole after ``limits.FRAGMENT_NS`` is dropped.
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane import libc, run
from appliance.dataplane.memory import counters
from appliance.dataplane.native import address_of, be16, copy, put_be16, put_be32
from appliance.dataplane.state import COLLECTING, FREE, HEADROOM, PART_MAX, ROOM, SPOILED
from appliance.dataplane.wire import ipv4, ipv6, vnet
from appliance.dataplane.wire.checksum import total
from appliance.observe.counters import COUNTS, FROM_WIRE, Count, Drop

_NONE = np.int64(-1)
_FRAGMENT, _TIMEOUT = Drop.FRAGMENT.value, Drop.FRAGMENT_TIMEOUT.value
_MALFORMED = Drop.MALFORMED.value
_REASSEMBLED = COUNTS + Count.REASSEMBLED.value


@njit
def collect(w, buffer, p, drops):
    """Take a fragment; gives the number of the collection that it makes whole, or -1. ``drops``: the stage's
    counters."""
    if p.version == 4 and total(buffer, p.at, p.l4 - p.at) != 0xFFFF:
        counters(w)[drops + _MALFORMED] += 1
        return _NONE
    number = _find(w, p, drops)
    if number < 0:
        number = _begin(w, p, drops)
    if number < 0 or w.collections[number].state == SPOILED:
        counters(w)[drops + _FRAGMENT] += 1
        return _NONE
    if not _add(w, number, buffer, p):
        counters(w)[drops + _FRAGMENT] += 1 + np.int64(w.collections[number].count)
        return _NONE
    c = w.collections[number]
    if c.end > 0 and c.received == c.end and c.part > 0:
        counters(w)[_REASSEMBLED] += 1
        return np.int64(number)
    return _NONE


@njit
def _key(p, drops):
    return np.int64(p.protocol) | p.version << 8 | drops << 16


@njit
def _find(w, p, drops):
    key = _key(p, drops)
    for number in range(limits.FRAGMENTED):
        c = w.collections[number]
        if (
            c.state != FREE
            and c.identification == p.identification
            and c.protocol == key
            and c.source_lo == p.source_lo
            and c.destination_lo == p.destination_lo
            and c.source_hi == p.source_hi
            and c.destination_hi == p.destination_hi
        ):
            return np.int64(number)
    return _NONE


@njit
def _begin(w, p, drops):
    """A free collection for a new datagram; -1 if there is none, or its source has its share."""
    free, own = _NONE, 0
    for number in range(limits.FRAGMENTED):
        c = w.collections[number]
        if c.state == FREE:
            free = np.int64(number)
        elif c.source_lo == p.source_lo and c.source_hi == p.source_hi:
            own += 1
    if free < 0 or own >= limits.FRAGMENTED // 4:
        return _NONE
    c = w.collections[free]
    c.source_hi, c.source_lo, c.destination_hi, c.destination_lo = (
        p.source_hi,
        p.source_lo,
        p.destination_hi,
        p.destination_lo,
    )
    c.identification, c.protocol = p.identification, _key(p, drops)
    c.deadline = w.state[0].now + limits.FRAGMENT_NS
    c.end, c.received, c.part, c.next_at, c.piece = 0, 0, 0, 0, 0
    c.state, c.count = COLLECTING, 0
    w.state[0].collecting += 1
    return free


@njit
def _add(w, number, buffer, p):
    """Store a fragment's data; False, and the datagram is spoiled, if it does not fit what is there."""
    c = w.collections[number]
    length = p.at + p.length - p.l4
    base = number * ROOM + HEADROOM
    for i in range(c.count):
        if p.offset < np.int64(c.at[i]) + np.int64(c.length[i]) and np.int64(c.at[i]) < p.offset + length:
            if p.offset == np.int64(c.at[i]) and length == np.int64(c.length[i]):
                return True  # the same once more, as networks do
            c.state = SPOILED
            return False
    end = p.offset + length
    ends_wrong = c.end > 0 and end > c.end
    if not p.more:
        ends_wrong = ends_wrong or (c.end > 0 and c.end != end) or _reaches_beyond(c, end)
    part = p.l4 - p.at if p.version == 4 else p.l4 - p.at - ipv6.FRAGMENT_LENGTH
    if ends_wrong or c.count >= limits.FRAGMENTS_EACH or part > PART_MAX:
        c.state = SPOILED
        return False
    if not p.more:
        c.end = end
    if p.offset == 0:
        c.part, c.next_at = part, p.next_at - p.at
        copy(w.collected, base - part, buffer, p.at, part)
    copy(w.collected, base + p.offset, buffer, p.l4, length)
    c.at[c.count], c.length[c.count] = p.offset, length
    c.count += 1
    c.received += length
    c.piece = max(c.piece, np.int64(p.length))
    return True


@njit
def _reaches_beyond(c, end):
    for i in range(c.count):
        if np.int64(c.at[i]) + np.int64(c.length[i]) > end:
            return True
    return False


@njit
def assemble(w, number, target, at):
    """Write the whole datagram of a collection into a buffer, and free the collection; gives the datagram's length.

    What a piece needs is left in ``w.pieces``: size, header part, place of its next header, identification.
    """
    c = w.collections[number]
    base, length = number * ROOM + HEADROOM - c.part, c.part + c.end
    version = (c.protocol >> 8) & 0xFF
    if version == 4:
        bits = be16(w.collected, base + ipv4.FRAGMENT) & ~ipv4.FRAGMENT_BITS
        put_be16(w.collected, base + ipv4.FRAGMENT, bits & 0xFFFF)
        ipv4.set_length(w.collected, base, length, c.part)
    else:
        put_be16(w.collected, base + ipv6.PAYLOAD_LENGTH, length - ipv6.HEADER)
        w.collected[base + c.next_at] = c.protocol & 0xFF
    copy(target, at, w.collected, base, length)
    w.pieces[0], w.pieces[1], w.pieces[2], w.pieces[3] = c.piece, c.part, c.next_at, c.identification
    _free(w, c)
    return length


@njit
def _free(w, c):
    c.state = FREE
    w.state[0].collecting -= 1


@njit
def expire(w):
    """Give up what was not made whole in time."""
    if w.state[0].collecting == 0:
        return
    for number in range(limits.FRAGMENTED):
        c = w.collections[number]
        if c.state != FREE and c.deadline <= w.state[0].now:
            if c.state == COLLECTING:
                counters(w)[(c.protocol >> 16) + _TIMEOUT] += np.int64(c.count)
            _free(w, c)


@njit
def _step(w, p):
    """Bytes of data in each piece but the last."""
    overhead = w.pieces[1] + (0 if p.version == 4 else ipv6.FRAGMENT_LENGTH)
    return (w.pieces[0] - overhead) & ~7


@njit
def _piece_header(w, target, space, buffer, p, offset, length, more):
    """Write the header of one piece; gives its length."""
    part = w.pieces[1]
    copy(target, space, buffer, p.at, part)
    if p.version == 4:
        bits = be16(buffer, p.at + ipv4.FRAGMENT) & ~ipv4.FRAGMENT_BITS & 0xFFFF
        put_be16(target, space + ipv4.FRAGMENT, bits | (offset >> 3) | (ipv4.MORE_FRAGMENTS if more else 0))
        ipv4.set_length(target, space, part + length, part)
        return part
    header = space + part
    target[header], target[header + 1] = buffer[p.at + w.pieces[2]], 0
    put_be16(target, header + ipv6.FRAGMENT_OFFSET, offset | (ipv6.MORE_BIT if more else 0))
    put_be32(target, header + ipv6.FRAGMENT_ID, w.pieces[3])
    target[space + w.pieces[2]] = ipv6.FRAGMENT_HEADER
    put_be16(target, space + ipv6.PAYLOAD_LENGTH, part + ipv6.FRAGMENT_LENGTH - ipv6.HEADER + length)
    return part + ipv6.FRAGMENT_LENGTH


@njit
def send(w, buffer, p, fd, node_hi, node_lo, port):
    """Append a datagram that came in pieces to the run of a socket and node, in pieces."""
    start, end, step = p.at + w.pieces[1], p.at + p.length, _step(w, p)
    header = w.pieces[1] + (0 if p.version == 4 else ipv6.FRAGMENT_LENGTH)
    at = start
    while at < end:
        length = min(step, end - at)
        space = run.prepare(w, fd, node_hi, node_lo, port, header + length)
        _piece_header(w, w.run_headers, space, buffer, p, at - start, length, at + length < end)
        run.add(w, address_of(w.run_headers, space), header, address_of(buffer, at), length)
        at += length
    run.flush(w)


@njit
def write(w, buffer, p):
    """Write a datagram that came in pieces into the TUN, in pieces. What is being merged must have been flushed."""
    start, end, step = p.at + w.pieces[1], p.at + p.length, _step(w, p)
    for i in range(vnet.LENGTH):
        w.merge_header[i] = 0
    at = start
    while at < end:
        length = min(step, end - at)
        header = _piece_header(w, w.merge_header, vnet.LENGTH, buffer, p, at - start, length, at + length < end)
        w.merge_iov[0], w.merge_iov[1] = address_of(w.merge_header, 0), vnet.LENGTH + header
        w.merge_iov[2], w.merge_iov[3] = address_of(buffer, at), length
        if libc.writev(w.libc, w.state[0].tun, address_of(w.merge_iov, 0), 2) < 0:
            counters(w)[FROM_WIRE + Drop.TUN_WRITE_FAILED.value] += 1
        else:
            counters(w)[COUNTS + Count.WRITTEN_CALLS.value] += 1
            counters(w)[COUNTS + Count.WRITTEN_PACKETS.value] += 1
            counters(w)[COUNTS + Count.WRITTEN_BYTES.value] += vnet.LENGTH + header + length
        at += length


@njit
def remember(w, p):
    """Note in a packet that was put together that it must leave in pieces. After ``classify``."""
    p.piece = w.pieces[0]
