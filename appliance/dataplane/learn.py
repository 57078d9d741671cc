"""Learned hosts: which node a sender's packets come from, as this worker has seen it.

Theory of operation
-------------------
A small set-associative cache in the worker's private memory: the inner source address of packets from other nodes, and
the underlay address they came from. It serves two ends. A sender that was found to be where it should (``source``) is
not looked up in the tables for each of its packets, only once an epoch. And an answer to a sender whose instance IP no
table has goes to the node that it came from: at once, and also while the cluster cannot be asked.

An entry is used again when its place is wanted by another sender and it is the oldest there, or was not confirmed for
``limits.LEARNED_NS``. The cache dies with its worker, and fills again with the next packets.
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane.memory import counters
from appliance.observe.counters import COUNTS, Count
from appliance.tables.read import mix

LEARNED = np.dtype(
    [
        ("hi", "i8"),  # the sender, as the wire has it; both words 0: free
        ("lo", "i8"),
        ("node_hi", "i8"),
        ("node_lo", "i8"),
        ("deadline", "i8"),
        ("epoch", "i8"),  # of the tables that it was last compared with
        ("port", "u4"),  # tunnel port of the node
        ("flags", "u4"),  # of the node's entry (``layout.NODE_OURS``)
        ("reserved", "i8"),
    ]
)
assert LEARNED.itemsize == 64

_LEARNED = COUNTS + Count.LEARNED.value
_SETS = limits.LEARNED_HOSTS // limits.LEARNED_WINDOW


@njit
def find(w, hi, lo):
    """Number of the entry of a sender, or -1."""
    first = (mix(hi, lo, w.flow_seed) & (_SETS - 1)) * limits.LEARNED_WINDOW
    for i in range(limits.LEARNED_WINDOW):
        entry = w.learned[first + i]
        if entry.lo == lo and entry.hi == hi and entry.deadline > w.state[0].now:
            return first + i
    return np.int64(-1)


@njit
def put(w, hi, lo, node_hi, node_lo, port, flags):
    """Remember where a sender is."""
    number = find(w, hi, lo)
    if number < 0:
        number = _oldest(w, hi, lo)
        counters(w)[_LEARNED] += 1
    entry, state = w.learned[number], w.state[0]
    entry.hi, entry.lo, entry.node_hi, entry.node_lo = hi, lo, node_hi, node_lo
    entry.port, entry.flags = port, flags
    entry.epoch, entry.deadline = state.epoch, state.now + limits.LEARNED_NS


@njit
def _oldest(w, hi, lo):
    first = (mix(hi, lo, w.flow_seed) & (_SETS - 1)) * limits.LEARNED_WINDOW
    oldest = first
    for i in range(1, limits.LEARNED_WINDOW):
        if w.learned[first + i].deadline < w.learned[oldest].deadline:
            oldest = first + i
    return oldest
