"""Addresses that no table has: who is asked, and what is kept until the answer comes.

Theory of operation
-------------------
A packet to an address that may belong to a service (or from a node that nobody has told us of) is kept, and the
supervisor is asked once. What follows an address that is waited for is kept behind the first packet, up to
``limits.HELD_EACH``; no other flow waits. Three things end the waiting:

- the tables have the address, or a packet came from it and told its node (``learn``): its packets go on, in order,
  before any that is read later;
- the supervisor says that nobody has it (``refusals``): its packets are dropped and their senders told; further ones
  are dropped at once for ``limits.REFUSED_NS``;
- ``limits.HELD_NS`` pass: dropped as well.

``WAITING`` is a table of this worker's private memory, one entry an address, found by linear probing in a window of
``limits.HELD_WINDOW`` places. Packets lie in chains of places of ``limits.HELD_SLOT`` bytes. A packet is preceded by a
``META`` of four words that says where it came from.

Shared with the supervisor, one writer a word: the miss ring (worker to supervisor) with an eventfd that says it has
something, and the ring of refusals (supervisor to worker) in the control words. A report for which the ring has no room
is lost and counted: its packets wait their time and are dropped. Held packets die with their worker.
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane import libc
from appliance.dataplane.memory import control, counters
from appliance.dataplane.native import address_of, copy, load_acquire, store_release, view
from appliance.observe.counters import COUNTS, Count
from appliance.tables.read import mix

FREE, ASKED, REFUSED = range(3)

WAITING = np.dtype(
    [
        ("hi", "i8"),
        ("lo", "i8"),
        ("deadline", "i8"),
        ("first", "i4"),  # place of the first packet, plus one; 0: none
        ("last", "i4"),
        ("count", "i4"),
        ("state", "i4"),
        ("from_wire", "i8"),  # what is kept came from other nodes, and waits to learn where its sender is
        ("reserved", "i8", 2),
    ]
)
assert WAITING.itemsize == 64

# What precedes a packet that is kept or passed on: four words.
KIND, PORT, NODE_HI, NODE_LO = range(4)  # KIND also has the size of its largest fragment (``PACKET.piece``), shifted
PIECE_SHIFT = 8
META_WORDS, META_LENGTH = 4, 32
FROM_CONTAINER, FROM_NODE = 1, 2  # kinds: behind a virtio header; bare, PORT and NODE tell the underlay's source

# Miss ring: words HEAD (the worker's) and TAIL (the supervisor's), then RECORD words each.
HEAD, TAIL, RECORDS, RECORD = 0, 8, 16, 4
ADDRESS, TOO_BIG = 1, 2  # what a record is: an unknown address; a node whose path is narrower than was thought
RING_WORDS = RECORDS + RECORD * limits.MISS_RING
SECTIONS = [("misses", np.dtype(np.int64), RING_WORDS)]

# Refusals, in the control words: how many were ever written, then two words each.
REFUSALS, REFUSED_AT = 8, 16

_MISSES, _LOST = COUNTS + Count.MISSES.value, COUNTS + Count.MISSES_LOST.value
_HELD = COUNTS + Count.HELD.value
_PLACES = limits.HELD_SLOT


@njit
def report(w, kind, hi, lo):
    """Tell the supervisor of an address. A full ring loses it."""
    ring = view(w.misses_at, RING_WORDS, np.int64)
    head = ring[HEAD]
    if head - load_acquire(ring, TAIL) >= limits.MISS_RING:
        counters(w)[_LOST] += 1
        return
    at = RECORDS + RECORD * (head & (limits.MISS_RING - 1))
    ring[at], ring[at + 1], ring[at + 2] = kind, hi, lo
    store_release(ring, HEAD, head + 1)
    counters(w)[_MISSES] += 1
    w.scratch[2] = 1
    libc.write(w.libc, w.state[0].missed, address_of(w.scratch, 2), 8)


@njit
def find(w, hi, lo):
    """Number of an address's entry, or -1."""
    if w.state[0].waiting == 0:
        return np.int64(-1)
    home = mix(hi, lo, w.flow_seed)
    for i in range(limits.HELD_WINDOW):
        number = (home + i) & (limits.HELD_ADDRESSES - 1)
        entry = w.waiting[number]
        if entry.lo == lo and entry.hi == hi and entry.state != FREE:
            return number
    return np.int64(-1)


@njit
def is_waited_for(w, hi, lo):
    """Whether packets of an address are kept: none may overtake them."""
    number = find(w, hi, lo)
    return number >= 0 and w.waiting[number].state == ASKED


@njit
def hold(w, hi, lo, meta, buffer, at, length):
    """Keep a packet until an address is known, and ask about it if nobody has; False if it cannot be kept.

    ``meta``: META_WORDS words, kept with the ``length`` bytes.
    """
    from_wire = meta[KIND] & 0xFF == FROM_NODE
    number = find(w, hi, lo)
    if number < 0 or (w.waiting[number].state == REFUSED and w.waiting[number].deadline <= w.state[0].now):
        number = _ask(w, number, hi, lo, from_wire)
    if number < 0 or w.waiting[number].state == REFUSED or w.waiting[number].count >= limits.HELD_EACH:
        return False
    if not _append(w, w.waiting[number], meta, buffer, at, length):
        return False
    counters(w)[_HELD] += 1
    return True


@njit
def _ask(w, number, hi, lo, from_wire):
    """Begin to wait for an address, in an entry that was refused or a free one; its number, or -1."""
    state = w.state[0]
    if state.waiting == 0:
        state.refusals = refusals(w)  # those of before answer nobody: they were not read while nobody waited
    if number < 0:
        if from_wire and state.waiting >= limits.HELD_FROM_WIRE:
            return np.int64(-1)
        number = _free_place(w, hi, lo)
        if number < 0:
            return number
        state.waiting += 1
    entry = w.waiting[number]
    entry.hi, entry.lo, entry.from_wire = hi, lo, from_wire
    entry.first, entry.last, entry.count = 0, 0, 0
    entry.state, entry.deadline = ASKED, state.now + limits.HELD_NS
    report(w, ADDRESS, hi, lo)
    return number


@njit
def _free_place(w, hi, lo):
    home = mix(hi, lo, w.flow_seed)
    for i in range(limits.HELD_WINDOW):
        number = (home + i) & (limits.HELD_ADDRESSES - 1)
        if w.waiting[number].state == FREE:
            return np.int64(number)
    return np.int64(-1)


@njit
def _append(w, entry, meta, buffer, at, length):
    """Copy a packet behind those that an entry has; False if there is no room."""
    needed = (META_LENGTH + length + _PLACES - 1) // _PLACES
    if w.held_free < needed:
        return False
    head = view(address_of(meta, 0), META_LENGTH, np.uint8)
    done, first = 0, np.int64(0)
    last = np.int64(0)
    while done < META_LENGTH + length:
        place = np.int64(w.held_stack[w.held_free - 1])
        w.held_free -= 1
        base = place * _PLACES
        room = _PLACES
        if done == 0:
            copy(w.held, base, head, 0, META_LENGTH)
            base, room, done = base + META_LENGTH, room - META_LENGTH, META_LENGTH
        part = min(room, META_LENGTH + length - done)
        copy(w.held, base, buffer, at + done - META_LENGTH, part)
        done += part
        w.held_more[place] = 0
        if first == 0:
            first = place + 1
            w.held_length[place] = length
            w.held_next[place] = 0
        else:
            w.held_more[last - 1] = place + 1
        last = place + 1
    if entry.last != 0:
        w.held_next[entry.last - 1] = first
    else:
        entry.first = first
    entry.last = first
    entry.count += 1
    return True


@njit
def take(w, place, meta, buffer, at):
    """Copy a kept packet out and free its places; gives the place of the packet behind it, plus one, and its length.

    ``place``: of the packet, plus one, as ``release`` or the last ``take`` gave it.
    """
    place -= 1
    following, length = np.int64(w.held_next[place]), np.int64(w.held_length[place])
    head = view(address_of(meta, 0), META_LENGTH, np.uint8)
    copy(head, 0, w.held, place * _PLACES, META_LENGTH)
    base, room, done = place * _PLACES + META_LENGTH, _PLACES - META_LENGTH, np.int64(0)
    while True:
        part = np.int64(min(np.int64(room), length - done))
        copy(buffer, at + done, w.held, base, part)
        done += part
        w.held_stack[w.held_free] = place
        w.held_free += 1
        if w.held_more[place] == 0:
            return following, length
        place = np.int64(w.held_more[place]) - 1
        base, room = place * _PLACES, _PLACES


@njit
def release(w, number):
    """End the waiting for an address; gives the place of its first packet, plus one."""
    entry = w.waiting[number]
    first = np.int64(entry.first)
    entry.state, entry.first, entry.last, entry.count = FREE, 0, 0, 0
    w.state[0].waiting -= 1
    return first


@njit
def refuse(w, number):
    """Nobody has an address, as far as we could learn; gives the place of its first packet, plus one."""
    entry = w.waiting[number]
    first = np.int64(entry.first)
    entry.state, entry.first, entry.last, entry.count = REFUSED, 0, 0, 0
    entry.deadline = w.state[0].now + limits.REFUSED_NS
    return first


@njit
def refusals(w):
    """How many refusals the supervisor has written."""
    return load_acquire(control(w), REFUSALS)


@njit
def refused_at(w, number):
    """Words of a refused address."""
    at = REFUSED_AT + 2 * (number & (limits.REFUSAL_RING - 1))
    return control(w)[at], control(w)[at + 1]
