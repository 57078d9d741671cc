"""The worker's loop: stages, and sleep when none has work.

A stage whose descriptor wakes it rarely takes one packet and goes back to sleep: two system calls a packet beside the
poll, which is what a request and its answer need. One that is woken again within ``_HOT_NS`` is *hot*: it drains its
descriptor, up to a batch, before the other stage gets its turn. It cools down when a batch found one packet or none.
While one stage goes on without a pause, the descriptors are asked every ``_POLL_NS`` what else is ready.

Between batches, packets that waited for an address are sent on or given up (``misses``), and flows and fragments that
are over are forgotten. Before sleeping the worker announces that it holds no reference into the tables
(``appliance.tables``), and after it the epoch that it starts with.

``work`` is the loop. It can also do one stage of a turn and return, for the loop of ``staged``: each stage has one
place where it is called, so that it is compiled once.
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane import capture, flow, fragment, handed, learn, libc, merge, misses, run, stages
from appliance.dataplane.inbound import inbound, is_sibling, receive, received
from appliance.dataplane.inbound import packet as from_node
from appliance.dataplane.memory import STAGED, STOP, control, counters
from appliance.dataplane.native import address_of, copy, fence, le32, le64, load_acquire, store_release
from appliance.dataplane.outbound import accept, outbound, reject, reserve
from appliance.dataplane.state import EVENT_DATA, EVENT_SIZE, EVENTS, SLOT
from appliance.observe.counters import ANNOUNCED, COUNTS, FROM_WIRE, HEARTBEAT, Count, Drop, Stage
from appliance.tables.layout import NODE_OURS
from appliance.tables.publish import ASLEEP
from appliance.tables.read import epoch, find_host, find_service

_HOT_NS = 20_000
_SWEEP_NS = 4_000_000
_SWEEPS_MAX = limits.WAIT_NS // _SWEEP_NS
_POLL_NS = 50_000
_GAP_MAX = 4  # a pause counts as so many times ``busy_ns`` at most, so that a few quick packets end its effect
_SETTLE_NS = 100_000_000
_HANDED_BATCH = limits.WIRE_BATCH
_WAITS, _EXPIRED = COUNTS + Count.WAITS.value, COUNTS + Count.FLOWS_EXPIRED.value
_LIVE = COUNTS + Count.FLOWS_LIVE.value
TUN_READY, WIRE_READY, HANDED_READY = 1, 2, 4
EVERYTHING = TUN_READY | WIRE_READY | HANDED_READY
UPKEEP, OUTBOUND, INBOUND, HANDED, WAIT = range(1, 6)  # ``todo``: one of these, once; 0: the loop
_WAIT, _UPKEEP = Stage.WAIT.value, Stage.UPKEEP.value
_UNKNOWN_PEER, _MALFORMED = FROM_WIRE + Drop.UNKNOWN_PEER.value, FROM_WIRE + Drop.MALFORMED.value


@njit(cache=True, nogil=True)
def work(workers):
    """Forward packets until the supervisor sets the stop word, or that of ``staged``; or do what ``todo`` says, once.
    ``workers``: an array of one worker's record."""
    w = workers[0]
    todo = w.state[0].todo
    ready, again = w.state[0].ready, w.state[0].again
    if todo == 0:
        flow.rebuild(w)
        ready = EVERYTHING
    while todo != 0 or (load_acquire(control(w), STOP) == 0 and control(w)[STAGED] == 0):
        if todo == 0 or todo == UPKEEP:
            begin_batch(w)
            again = 0
        if ready & TUN_READY and (todo == 0 or todo == OUTBOUND):
            again |= outbound_turn(w)
        if ready & WIRE_READY and (todo == 0 or todo == INBOUND):
            again |= inbound_turn(w)
        if ready & HANDED_READY and (todo == 0 or todo == HANDED):
            again |= handed_turn(w)
        if todo == 0 or todo == WAIT:
            end_batch(w)
            ready = look(w, again) if again else wait(w)
        if todo != 0:
            w.state[0].ready, w.state[0].again = ready, again
            return
    store_release(counters(w), ANNOUNCED, ASLEEP)


@njit
def begin_batch(w):
    """Take the time, announce the epoch, and now and then look for flows that expired."""
    state = w.state[0]
    capture.begin(w)
    state.now = libc.monotonic(w.libc, w.scratch)
    stages.begin(w, _UPKEEP)
    current = epoch(w)
    if current != counters(w)[ANNOUNCED]:
        store_release(counters(w), ANNOUNCED, current)
        fence()  # no look at the tables may come before the announcement
    state.epoch = current
    counters(w)[HEARTBEAT] = state.now
    if state.now >= state.next_sweep:
        missed = min((state.now - state.next_sweep) // _SWEEP_NS, _SWEEPS_MAX)  # while it slept
        state.next_sweep = state.now + _SWEEP_NS
        counters(w)[_EXPIRED] += flow.sweep(w, state.now, limits.SWEEP_STEP * (1 + missed))
        counters(w)[_LIVE] = flow.live(w)
        fragment.expire(w)
    if state.waiting > 0:
        settle(w)


@njit
def end_batch(w):
    """Packets that an answer waits for already do not wait for the next batch."""
    if w.state[0].waiting > 0 and w.state[0].next_settle == 0:
        settle(w)
    stages.enter(w, _WAIT)


@njit
def settle(w):
    """Look whether an answer has come for an address that packets wait for."""
    state = w.state[0]
    written = misses.refusals(w)
    if state.epoch == state.settled and written == state.refusals and state.now < state.next_settle:
        return
    state.settled, state.next_settle = state.epoch, state.now + _SETTLE_NS
    _take_refusals(w, written)
    for number in range(limits.HELD_ADDRESSES):
        entry = w.waiting[number]
        if entry.state == misses.FREE:
            continue
        if entry.state == misses.ASKED and _is_known(w, entry):
            _go_on(w, misses.release(w, number))
        elif entry.deadline <= state.now:
            was_asked = entry.state == misses.ASKED
            first = misses.refuse(w, number) if was_asked else misses.release(w, number)
            _give_up(w, first)


@njit
def _take_refusals(w, written):
    """Those of the supervisor's refusals that were not read yet; what the ring has lost is given up in its time."""
    state = w.state[0]
    first = max(state.refusals, written - limits.REFUSAL_RING)
    state.refusals = written
    for i in range(first, written):
        hi, lo = misses.refused_at(w, i)
        number = misses.find(w, hi, lo)
        if number >= 0 and w.waiting[number].state == misses.ASKED and not _is_known(w, w.waiting[number]):
            _give_up(w, misses.refuse(w, number))


@njit
def _is_known(w, entry):
    """Whether an address is known now: the tables have it, or it was heard from and its node translates it."""
    if find_service(w, entry.hi, entry.lo) >= 0 or find_host(w, entry.hi, entry.lo) >= 0:
        return True
    if entry.from_wire:
        return False
    number = learn.find(w, entry.hi, entry.lo)
    return number >= 0 and w.learned[number].flags & NODE_OURS != 0


@njit
def _go_on(w, place):
    """Send a chain of packets on its way, in the order in which they came."""
    while place:
        at = reserve(w)
        place, length = misses.take(w, place, w.meta, w.buffer, at)
        if handed.recall(w) == misses.FROM_CONTAINER:
            accept(w, at, length, True, w.pieces[0])
        else:
            from_node(w, w.buffer, at, length, False, w.pieces[0])
            merge.flush(w)
            run.flush(w)
    run.flush(w)
    merge.flush(w)


@njit
def _give_up(w, place):
    """Drop a chain of packets, and tell the containers that sent them."""
    while place:
        at = reserve(w)
        place, length = misses.take(w, place, w.meta, w.buffer, at)
        if handed.recall(w) == misses.FROM_CONTAINER:
            reject(w, at, length)
        else:
            counters(w)[_UNKNOWN_PEER] += 1


@njit
def outbound_turn(w):
    """One batch from the TUN; gives ``TUN_READY`` if there is more."""
    state = w.state[0]
    if state.now - state.tun_woken < _HOT_NS:
        state.tun_hot = 1
    state.tun_woken = state.now
    limit = limits.TUN_BATCH if state.tun_hot else 1
    count = outbound(w, limit)
    if count <= 1:
        state.tun_hot = 0
        return 0
    return TUN_READY if count == limit else 0


@njit
def inbound_turn(w):
    """One batch from the wire; gives ``WIRE_READY`` if there may be more."""
    state = w.state[0]
    if state.now - state.wire_woken < _HOT_NS:
        state.wire_hot = 1
    state.wire_woken = state.now
    limit = limits.WIRE_BATCH if state.wire_hot else 1
    count = inbound(w, limit)
    if count <= 1:
        state.wire_hot = 0
        return 0
    return WIRE_READY if count == limit else 0


@njit
def handed_turn(w):
    """One batch of what siblings passed on; gives ``HANDED_READY`` if there may be more."""
    count = receive(w, w.state[0].handoff, _HANDED_BATCH)
    for slot in range(count):
        length, start = received(w, slot), slot * SLOT
        if not is_sibling(w, slot) or length <= misses.META_LENGTH:
            counters(w)[_MALFORMED] += 1
            continue
        for word in range(misses.META_WORDS):
            w.meta[word] = le64(w.slots, start + 8 * word)
        _take_handed(w, start + misses.META_LENGTH, length - misses.META_LENGTH)
    merge.flush(w)
    run.flush(w)
    return HANDED_READY if count == _HANDED_BATCH else 0


@njit
def _take_handed(w, start, length):
    if handed.recall(w) == misses.FROM_CONTAINER:
        at = reserve(w)
        copy(w.buffer, at, w.slots, start, length)
        accept(w, at, length, True, w.pieces[0])
    else:
        from_node(w, w.slots, start, length, True, w.pieces[0])


@njit
def look(w, again):
    """What is ready beside the stages that have not finished: asked now and then, without sleeping."""
    state = w.state[0]
    if state.now - state.polled < _POLL_NS:
        return np.int64(again)
    state.polled = state.now
    return again | _ready(w, 0)


@njit
def wait(w):
    """Wait until a descriptor is ready; gives which stages have work.

    With ``workers.busy_poll`` it looks for a while before it sleeps, if packets have lately come that soon: waking up
    costs more than that, and on a virtual machine a halted CPU costs an exit. It gives way at each look, so that
    whoever else is ready on this CPU runs.
    """
    state = w.state[0]
    if state.busy_ns == 0:
        return _sleep(w)
    ready = _look_for_a_while(w) if state.gap < state.busy_ns else np.int64(0)
    if ready == 0:
        ready = _sleep(w)
    waited = libc.monotonic(w.libc, w.scratch) - state.now
    state.gap += (min(waited, _GAP_MAX * state.busy_ns) - state.gap) >> 3
    return ready


@njit
def _sleep(w):
    store_release(counters(w), ANNOUNCED, ASLEEP)
    counters(w)[_WAITS] += 1
    return _ready(w, -1)


@njit
def _look_for_a_while(w):
    until = w.state[0].now + w.state[0].busy_ns
    while libc.monotonic(w.libc, w.scratch) < until:
        ready = _ready(w, 0)
        if ready or load_acquire(control(w), STOP):
            return ready
        libc.give_way(w.libc)
    return np.int64(0)


@njit
def _ready(w, milliseconds):
    count = libc.wait(w.libc, w.state[0].epoll, address_of(w.events, 0), EVENTS, milliseconds)
    ready = 0
    for i in range(count):
        fd = le32(w.events, i * EVENT_SIZE + EVENT_DATA)
        if fd == w.state[0].tun:
            ready |= TUN_READY
        elif fd == w.state[0].wire:
            ready |= WIRE_READY
        elif fd == w.state[0].handoff:
            ready |= HANDED_READY
        elif fd == w.state[0].timer:
            libc.read(w.libc, fd, address_of(w.scratch, 0), 8)
    return np.int64(ready)
