"""The flow table of one worker.

Theory of operation
-------------------
Flow records lie in shared memory (a memfd that the supervisor keeps), so they survive the worker; the index and the
free list are the worker's private memory and are rebuilt from the records when a worker takes a table over. A record
whose ``state`` is not FREE is complete: the state is stored last.

A flow is found by two keys. Outbound: local and dialled address, ports, protocol. Inbound: local and ``peer`` address,
since answers come from the chosen instance and not from the ServiceIP. Where both are the same address, one index slot
carries both sides. The index is open addressing with linear probing; deletion shifts back, so there are no tombstones.
A slot is a word: the low 32 bits of the hash, the record's number, and the sides that it answers for.

``epoch`` is the publication of the tables at which the flow was last compared with them. While it is current, a packet
needs no look at the tables; when it is not, ``decide.refresh`` compares the backend's generation, and a flow
whose instance is gone is decided anew at once.

Live flows are counted by their target (``memory.loads``) from ``commit`` to ``remove``, for policies that want to know.

Limits: ``workers.flows`` records; ``limits.FLOW_LOAD`` index slots each; the time-outs in ``limits``. When all records
are in use, ``evict`` gives up the flow that nobody ever answered, then an idle UDP one, and never an active TCP one.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane.memory import loads
from appliance.dataplane.native import prefetch, release, view
from appliance.dataplane.wire import tcp
from appliance.tables.read import mix

FREE, OPENING, ANSWERED, CLOSING = range(4)  # states; OPENING: only one side has spoken

OUTBOUND, INBOUND = 1, 2  # sides of an index slot

LOCAL = 1  # flag: the target is on this node
TRANSLATES = 2  # flag: answers need the dialled address put back
DIRECT = 4  # flag: a namespace address was dialled, and nothing is rewritten
LEARNED = 8  # flag: no table has the dialled address; its node was learned, and translates it

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58

FLOW = np.dtype(
    [
        # match
        ("local_hi", "i8"),
        ("local_lo", "i8"),
        ("dialled_hi", "i8"),
        ("dialled_lo", "i8"),
        ("peer_hi", "i8"),
        ("peer_lo", "i8"),
        # rewrites
        ("source_hi", "i8"),  # own instance IP
        ("source_lo", "i8"),
        ("target_hi", "i8"),
        ("target_lo", "i8"),
        # where to
        ("node_hi", "i8"),
        ("node_lo", "i8"),
        # life
        ("deadline", "i8"),
        ("epoch", "i8"),
        ("packets_out", "i8"),
        ("packets_in", "i8"),
        ("bytes_out", "i8"),
        ("bytes_in", "i8"),
        ("generation", "u4"),  # of the target's host entry
        ("local_generation", "u4"),
        ("delta_out", "u4"),  # what the rewrite adds to a checksum's sum
        ("delta_in", "u4"),
        ("steer", "u4"),  # steering hash at the receiver
        ("local_port", "u4"),
        ("remote_port", "u4"),
        ("backend", "u4"),  # ordinal of the target's host entry
        ("offered", "u4"),  # generation of the service's entry at which the target was in its choice list
        ("node_port", "u2"),
        ("protocol", "u1"),
        ("flags", "u1"),
        ("state", "u1"),
        ("reserved0", "u1"),
        ("mtu", "u2"),  # largest packet that fits the path to the node, inside the tunnel
        ("reserved", "u1", 4),
    ]
)
RECORD_SIZE, _LINE = 192, 64
assert FLOW.itemsize == RECORD_SIZE


# Fields of a worker's record that locate its flow table.
LOCATIONS = [
    ("records_at", "i8"),
    ("records_count", "i8"),
    ("index_at", "i8"),  # int64 slots
    ("index_mask", "i8"),
    ("free_at", "i8"),  # int32 stack of free record numbers
    ("free_count", "i8"),
    ("flow_seed", "i8"),
    ("sweep_at", "i8"),
    ("evict_at", "i8"),
]


class FlowTable(NamedTuple):
    """The arrays of a flow table; whoever makes a worker keeps them alive."""

    records: Any  # shared
    index: Any
    free: Any


def make(w: Any, records: Any, seed: int) -> FlowTable:
    """A flow table over existing records, entered into a worker's record. What the records hold is taken over later,
    by ``rebuild``."""
    slots = 1 << (len(records) * limits.FLOW_LOAD - 1).bit_length()
    flows = FlowTable(records, np.zeros(slots, np.int64), np.zeros(len(records), np.int32))
    w["records_at"], w["records_count"] = records.ctypes.data, len(records)
    w["index_at"], w["index_mask"] = flows.index.ctypes.data, slots - 1
    w["free_at"], w["flow_seed"] = flows.free.ctypes.data, seed
    return flows


@njit
def records(w):
    """Flow records."""
    return view(w.records_at, w.records_count, FLOW)


@njit
def _index(w):
    return view(w.index_at, w.index_mask + 1, np.int64)


@njit
def _free(w):
    return view(w.free_at, w.records_count, np.int32)


@njit
def key_hash(w, local_hi, local_lo, remote_hi, remote_lo, local_port, remote_port, protocol):
    """Hash of a flow key, 32 bits, never zero in its index slot."""
    ports = (local_port << 24) ^ (remote_port << 8) ^ protocol
    return mix(local_hi ^ (remote_hi * 3), mix(local_lo, remote_lo, ports), w.flow_seed) & 0xFFFFFFFF


@njit
def _slot(hashed, number, sides):
    return (hashed << 32) | (number << 2) | sides


@njit
def find(w, side, local_hi, local_lo, remote_hi, remote_lo, local_port, remote_port, protocol):
    """Number of the flow with this key on this side, or -1."""
    hashed = key_hash(w, local_hi, local_lo, remote_hi, remote_lo, local_port, remote_port, protocol)
    mask = w.index_mask
    at = hashed & mask
    while True:
        slot = _index(w)[at]
        if slot == 0:
            return np.int64(-1)
        if ((slot >> 32) & 0xFFFFFFFF) == hashed and slot & side:
            number = (slot & 0xFFFFFFFF) >> 2
            f = records(w)[number]
            far_hi, far_lo = (f.dialled_hi, f.dialled_lo) if side == OUTBOUND else (f.peer_hi, f.peer_lo)
            if (
                f.local_lo == local_lo
                and far_lo == remote_lo
                and f.local_hi == local_hi
                and far_hi == remote_hi
                and f.local_port == local_port
                and f.remote_port == remote_port
                and f.protocol == protocol
            ):
                return number
        at = (at + 1) & mask


@njit
def foresee(w, hashed):
    """Have the index slot of a key's hash come into the cache: it will be looked for soon."""
    prefetch(w.index_at + 8 * (hashed & w.index_mask))


@njit
def approach(w, hashed):
    """Have the record come too that the slot names, if it is the one; the slot is there by now."""
    slot = _index(w)[hashed & w.index_mask]
    if ((slot >> 32) & 0xFFFFFFFF) == hashed:
        at = w.records_at + RECORD_SIZE * ((slot & 0xFFFFFFFF) >> 2)
        prefetch(at)
        prefetch(at + _LINE)
        prefetch(at + 2 * _LINE)


@njit
def _place(w, hashed, number, sides):
    mask = w.index_mask
    at = hashed & mask
    while _index(w)[at] != 0:
        at = (at + 1) & mask
    _index(w)[at] = _slot(hashed, number, sides)


@njit
def _unplace(w, hashed, number):
    """Take a record's slot out and shift back what had been pushed past it (Knuth, TAOCP 3, 6.4 algorithm R)."""
    mask = w.index_mask
    at = hashed & mask
    while _index(w)[at] != 0 and (_index(w)[at] & 0xFFFFFFFF) >> 2 != number:
        at = (at + 1) & mask
    if _index(w)[at] == 0:
        return
    hole, at = at, (at + 1) & mask
    while _index(w)[at] != 0:
        home = (_index(w)[at] >> 32) & mask
        if ((at - home) & mask) >= ((at - hole) & mask):
            _index(w)[hole] = _index(w)[at]
            hole = at
        at = (at + 1) & mask
    _index(w)[hole] = 0


@njit
def _hash_of(w, f, inbound):
    far_hi, far_lo = (f.peer_hi, f.peer_lo) if inbound else (f.dialled_hi, f.dialled_lo)
    return key_hash(
        w, f.local_hi, f.local_lo, far_hi, far_lo, np.int64(f.local_port), np.int64(f.remote_port), np.int64(f.protocol)
    )


@njit
def insert(w, number):
    """Make a filled record visible under its keys.

    Answers to a namespace address that was dialled directly look like those to a ServiceIP that led there from the same
    port; they stay with the earlier flow.
    """
    f = records(w)[number]
    if f.flags & DIRECT and _is_answered_elsewhere(w, f):
        _place(w, _hash_of(w, f, False), number, OUTBOUND)
    elif f.peer_lo == f.dialled_lo and f.peer_hi == f.dialled_hi:
        _place(w, _hash_of(w, f, False), number, OUTBOUND | INBOUND)
    else:
        _place(w, _hash_of(w, f, False), number, OUTBOUND)
        _place(w, _hash_of(w, f, True), number, INBOUND)


@njit
def _is_answered_elsewhere(w, f):
    """Whether another flow has the inbound key of a record."""
    local, remote, protocol = np.int64(f.local_port), np.int64(f.remote_port), np.int64(f.protocol)
    return find(w, INBOUND, f.local_hi, f.local_lo, f.peer_hi, f.peer_lo, local, remote, protocol) >= 0


@njit
def remove(w, number):
    """Forget a flow and free its record."""
    f = records(w)[number]
    _unplace(w, _hash_of(w, f, False), number)
    if f.peer_lo != f.dialled_lo or f.peer_hi != f.dialled_hi:
        _unplace(w, _hash_of(w, f, True), number)
    f.state = FREE
    loads(w)[f.backend] -= 1
    _free(w)[w.free_count] = number
    w.free_count += 1


@njit
def allocate(w, now):
    """Number of a free record, evicting if need be, or -1. The caller fills it, then ``commit``s it."""
    if w.free_count == 0 and not _evict(w, now):
        return np.int64(-1)
    w.free_count -= 1
    return np.int64(_free(w)[w.free_count])


@njit
def commit(w, number, state):
    """Publish a filled record: the state is stored after everything else."""
    release()
    f = records(w)[number]
    f.state = state
    loads(w)[f.backend] += 1
    insert(w, number)


@njit
def _rank(f, now):
    """How readily a flow is given up: higher goes first, 0 never."""
    if f.deadline <= now:
        return 4
    if f.state == OPENING:
        return 3
    if f.state == CLOSING:
        return 2
    return 1 if f.protocol != TCP else 0


@njit
def _evict(w, now):
    """Give up the worst of some records. False if all that were looked at are active TCP."""
    for _ in range(limits.EVICT_SCANS):
        worst = _worst(w, now)
        if worst >= 0:
            remove(w, worst)
            return True
    return False


@njit
def _worst(w, now):
    """The worst of the next records (oldest deadline within a rank), or -1."""
    capacity = w.records_count
    worst, worst_rank, worst_deadline = np.int64(-1), 0, np.int64(0)
    for i in range(min(limits.EVICT_SCAN, capacity)):
        number = (w.evict_at + i) % capacity
        f = records(w)[number]
        rank = _rank(f, now)
        if rank > worst_rank or (rank == worst_rank and rank > 0 and f.deadline < worst_deadline):
            worst, worst_rank, worst_deadline = number, rank, f.deadline
    w.evict_at = (w.evict_at + limits.EVICT_SCAN) % capacity
    return worst


@njit
def sweep(w, now, step):
    """Remove the flows that expired among the next ``step`` records; gives how many."""
    capacity = w.records_count
    removed = 0
    for i in range(min(step, capacity)):
        number = (w.sweep_at + i) % capacity
        f = records(w)[number]
        if f.state != FREE and f.deadline <= now:
            remove(w, number)
            removed += 1
    w.sweep_at = (w.sweep_at + step) % capacity
    return removed


@njit
def live(w):
    """Flows in the table."""
    return w.records_count - np.int64(w.free_count)


@njit
def rebuild(w):
    """Index, free list and counts of flows from the records alone; direct flows last, as they yield to the others."""
    _index(w)[:] = 0
    loads(w)[:] = 0
    w.free_count = 0
    for back in range(w.records_count):
        number = w.records_count - 1 - back  # low numbers on top of the stack
        if records(w)[number].state == FREE:
            _free(w)[w.free_count] = number
            w.free_count += 1
    for direct in (0, DIRECT):
        for number in range(w.records_count):
            f = records(w)[number]
            if f.state != FREE and f.flags & DIRECT == direct:
                loads(w)[f.backend] += 1
                insert(w, number)


@njit
def touch(f, outbound, tcp_flags, now):
    """Note a packet of a flow: its state and how long it may rest from now."""
    if f.state == OPENING and not outbound:
        f.state = ANSWERED
    if f.protocol == TCP:
        if tcp_flags & (tcp.FIN | tcp.RST):
            f.state = CLOSING
        elif f.state == CLOSING and tcp_flags & tcp.SYN:
            f.state = OPENING
        rest = limits.TCP_ESTABLISHED
        if f.state == OPENING:
            rest = limits.TCP_OPENING
        elif f.state == CLOSING:
            rest = limits.TCP_CLOSING
    elif f.protocol == ICMP or f.protocol == ICMP6:
        rest = limits.ICMP_TIMEOUT
    else:
        rest = limits.UDP_ANSWERED if f.state == ANSWERED else limits.UDP_UNANSWERED
    f.deadline = now + rest
