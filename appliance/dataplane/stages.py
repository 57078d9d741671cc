"""Where a worker's time goes: the nanoseconds of each stage, always on, of one turn in ``EVERY``.

A turn of the worker's loop that is sampled takes the time at each change of its stage (``observe.counters.Stage``),
some 30 ns each. In all other turns ``enter`` is one comparison. A turn includes the sleep at its end, so that the
shares of the stages are shares of the time, and what is not ``wait`` is the worker's load.
"""

from numba import njit

from appliance.dataplane import libc
from appliance.dataplane.memory import counters
from appliance.observe.counters import COUNTS, SAMPLED, SAMPLED_PACKETS, STAGES, Count

EVERY = 64
_TUN_PACKETS, _WIRE_PACKETS = COUNTS + Count.TUN_PACKETS.value, COUNTS + Count.WIRE_PACKETS.value


@njit
def begin(w, stage):
    """Begin a turn, at ``state.now``, with a stage; the last one ends."""
    state = w.state[0]
    if state.sampled:
        counters(w)[STAGES + state.stage] += state.now - state.stage_since
        counters(w)[SAMPLED] += 1
        counters(w)[SAMPLED_PACKETS] += _packets(w) - state.sampled_packets
    state.turn += 1
    state.sampled = 0
    if state.turn & (EVERY - 1) == 0:
        state.sampled, state.stage, state.stage_since, state.sampled_packets = 1, stage, state.now, _packets(w)


@njit
def enter(w, stage):
    """Begin a stage within a turn; gives the one that it interrupts, which may be entered again at its end."""
    state = w.state[0]
    interrupted = state.stage
    if state.sampled:
        now = libc.monotonic(w.libc, w.scratch)
        counters(w)[STAGES + interrupted] += now - state.stage_since
        state.stage_since = now
        state.stage = stage
    return interrupted


@njit
def _packets(w):
    return counters(w)[_TUN_PACKETS] + counters(w)[_WIRE_PACKETS]
