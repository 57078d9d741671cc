"""Packets for ``appliance capture``: copied into a ring that the supervisor reads, while it asks for them.

Theory of operation
-------------------
The supervisor sets a word of ``control``; a worker looks at it once a batch (``begin``), and while ``state.capturing``
is 0, the four places where packets pass cost one predictable branch beside a system call each. The ring lies behind the
miss ring in the segment of what a worker tells its supervisor: memory that nobody touched is none.

A record is ``limits.CAPTURE_SLOT`` bytes: ``HEADER`` words, then the packet as far as it fits. The worker writes
records and, once a batch, HEAD; the supervisor writes TAIL. For what the ring has no room is counted in LOST. A packet
that came is noted before it is rewritten; if it was dropped, its record gets the reason before it is published.

A super-packet is one record at the TUN; on the underlay each packet of a train is one.
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane.memory import CAPTURE, control, counters
from appliance.dataplane.misses import CAPTURE_AT
from appliance.dataplane.native import copy, load_acquire, store_release, view
from appliance.observe.counters import FROM_TUN, WORDS
from appliance.tables.layout import words

FROM_CONTAINER, TO_NODE, FROM_NODE, TO_CONTAINER = range(1, 5)  # kinds: where a packet passes

HEAD, TAIL, LOST, RECORDS = 0, 8, 16, 64  # words of the ring; HEAD and LOST are the worker's, TAIL the supervisor's
TIME, KIND, LENGTH, KEPT, NODE_HI, NODE_LO, PORT, REASON = range(8)  # words of a record; REASON: the counter's word
HEADER = 8
SLOT_WORDS = limits.CAPTURE_SLOT // 8
ROOM = limits.CAPTURE_SLOT - 8 * HEADER  # bytes of a packet that a record has room for
RING_WORDS = RECORDS + SLOT_WORDS * limits.CAPTURE_SLOTS
NOWHERE = words("::")


@njit
def _ring(w):
    return view(w.misses_at + 8 * CAPTURE_AT, RING_WORDS, np.int64)


@njit
def begin(w):
    """Publish what the last batch noted, and look whether packets are still wanted."""
    state = w.state[0]
    wanted = control(w)[CAPTURE]
    if state.capturing == 0 and wanted == 0:
        return
    ring = _ring(w)
    if state.capturing:
        store_release(ring, HEAD, state.captured)
    else:
        state.captured = ring[HEAD]
    state.capturing = wanted


@njit
def note(w, kind, address, length, more, more_length, hi, lo, port):
    """Copy a packet that lies in two pieces of memory, and the node that it comes from or goes to; gives its place."""
    state, ring = w.state[0], _ring(w)
    if state.captured - load_acquire(ring, TAIL) >= limits.CAPTURE_SLOTS:
        ring[LOST] += 1
        return np.int64(-1)
    at = RECORDS + SLOT_WORDS * (state.captured & (limits.CAPTURE_SLOTS - 1))
    state.captured += 1
    kept, rest = min(length, ROOM), min(more_length, max(0, ROOM - length))
    ring[at + TIME], ring[at + KIND], ring[at + LENGTH] = state.now, kind, length + more_length
    ring[at + KEPT], ring[at + REASON] = kept + rest, 0
    ring[at + NODE_HI], ring[at + NODE_LO], ring[at + PORT] = hi, lo, port
    data = view(w.misses_at + 8 * (CAPTURE_AT + at + HEADER), ROOM, np.uint8)
    copy(data, 0, view(address, kept, np.uint8), 0, kept)
    if rest:
        copy(data, kept, view(more, rest, np.uint8), 0, rest)
    return at


@njit
def arrived(w, kind, address, length):
    """Note a packet that came, before it is rewritten; gives its place for ``judged``."""
    state = w.state[0]
    for i in range(FROM_TUN, WORDS):
        w.drops_before[i - FROM_TUN] = counters(w)[i]
    hi, lo, port = NOWHERE[0], NOWHERE[1], np.int64(0)
    if kind == FROM_NODE:
        hi, lo, port = state.outer_hi, state.outer_lo, state.outer_port
    return note(w, kind, address, length, 0, 0, hi, lo, port)


@njit
def judged(w, at):
    """If the packet that is noted there was dropped, say why."""
    if at < 0:
        return
    for i in range(FROM_TUN, WORDS):
        if counters(w)[i] != w.drops_before[i - FROM_TUN]:
            _ring(w)[at + REASON] = i


@njit
def written(w, vectors):
    """Note what is written into the TUN: the first vector begins with a virtio header."""
    head = w.merge_iov[0] + limits.VNET_HEADER
    length, more = w.merge_iov[1] - limits.VNET_HEADER, np.int64(0)
    for i in range(1, vectors):
        more += w.merge_iov[2 * i + 1]
    tail = w.merge_iov[2] if vectors > 1 else np.int64(0)
    first = w.merge_iov[3] if vectors > 1 else np.int64(0)
    at = note(w, TO_CONTAINER, head, length, tail, first, NOWHERE[0], NOWHERE[1], 0)
    if at >= 0:  # of a super-packet, what lies in further pieces is only counted
        _ring(w)[at + LENGTH] = length + more
