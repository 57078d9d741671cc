"""The worker's loop: two stages, and sleep when neither has work.

A stage whose descriptor wakes it rarely takes one packet and goes back to sleep: two system calls a packet beside the
poll, which is what a request and its answer need. One that is woken again within ``_HOT_NS`` is *hot*: it drains its
descriptor, up to a batch, before the other stage gets its turn. It cools down when a batch found one packet or none.

Before sleeping the worker announces that it holds no reference into the tables (``appliance.tables``), and after it the
epoch that it starts with.
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane import flow, libc
from appliance.dataplane.inbound import inbound
from appliance.dataplane.memory import STOP, control, counters
from appliance.dataplane.native import address_of, fence, le32, load_acquire, store_release
from appliance.dataplane.outbound import outbound
from appliance.dataplane.state import EVENT_DATA, EVENT_SIZE, EVENTS
from appliance.observe.counters import ANNOUNCED, COUNTS, HEARTBEAT, Count
from appliance.tables.publish import ASLEEP
from appliance.tables.read import epoch

_HOT_NS = 20_000
_SWEEP_NS = 4_000_000
_WAITS, _EXPIRED = COUNTS + Count.WAITS.value, COUNTS + Count.FLOWS_EXPIRED.value
_LIVE = COUNTS + Count.FLOWS_LIVE.value
_TUN_READY, _WIRE_READY = 1, 2


@njit(cache=True, nogil=True)
def work(workers):
    """Forward packets until the supervisor sets the stop word. ``workers``: an array of one worker's record."""
    w = workers[0]
    flow.rebuild(w)
    ready = _TUN_READY | _WIRE_READY
    while load_acquire(control(w), STOP) == 0:
        begin_batch(w)
        again = 0
        if ready & _TUN_READY:
            again |= outbound_turn(w)
        if ready & _WIRE_READY:
            again |= inbound_turn(w)
        ready = again if again else wait(w)
    store_release(counters(w), ANNOUNCED, ASLEEP)


@njit
def begin_batch(w):
    """Take the time, announce the epoch, and now and then look for flows that expired."""
    state = w.state[0]
    state.now = libc.monotonic(w.libc, w.scratch)
    current = epoch(w)
    if current != counters(w)[ANNOUNCED]:
        store_release(counters(w), ANNOUNCED, current)
        fence()  # no look at the tables may come before the announcement
    state.epoch = current
    counters(w)[HEARTBEAT] = state.now
    if state.now >= state.next_sweep:
        state.next_sweep = state.now + _SWEEP_NS
        counters(w)[_EXPIRED] += flow.sweep(w, state.now, limits.SWEEP_STEP)
        counters(w)[_LIVE] = flow.live(w)


@njit
def outbound_turn(w):
    """One batch from the TUN; gives ``_TUN_READY`` if there is more."""
    state = w.state[0]
    if state.now - state.tun_woken < _HOT_NS:
        state.tun_hot = 1
    state.tun_woken = state.now
    limit = limits.TUN_BATCH if state.tun_hot else 1
    count = outbound(w, limit)
    if count <= 1:
        state.tun_hot = 0
        return 0
    return _TUN_READY if count == limit else 0


@njit
def inbound_turn(w):
    """One batch from the wire; gives ``_WIRE_READY`` if there may be more."""
    state = w.state[0]
    if state.now - state.wire_woken < _HOT_NS:
        state.wire_hot = 1
    state.wire_woken = state.now
    limit = limits.WIRE_BATCH if state.wire_hot else 1
    count = inbound(w, limit)
    if count <= 1:
        state.wire_hot = 0
        return 0
    return _WIRE_READY if count == limit else 0


@njit
def wait(w):
    """Sleep until a descriptor is ready; gives which stages have work."""
    store_release(counters(w), ANNOUNCED, ASLEEP)
    counters(w)[_WAITS] += 1
    count = libc.wait(w.libc, w.state[0].epoll, address_of(w.events, 0), EVENTS)
    ready = 0
    for i in range(count):
        fd = le32(w.events, i * EVENT_SIZE + EVENT_DATA)
        if fd == w.state[0].tun:
            ready |= _TUN_READY
        elif fd == w.state[0].wire:
            ready |= _WIRE_READY
    return np.int64(ready)
