"""Arrays that a worker shares with the supervisor, or that depend on a capacity: found through its record."""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane.native import view
from appliance.observe.counters import WORDS

LOCATIONS = [
    ("counters_at", "i8"),
    ("control_at", "i8"),
    ("misses_at", "i8"),
    ("positions_at", "i8"),
    ("positions_count", "i8"),
    ("loads_at", "i8"),
    ("loads_count", "i8"),
    ("sticky_at", "i8"),
    ("sticky_count", "i8"),
]

# A cache line of words, one with the refusals' count, and the refusals (``misses``).
CONTROL_COUNT = 16 + 2 * limits.REFUSAL_RING
SECTIONS = [("control", np.dtype(np.int64), CONTROL_COUNT)]
STOP = 0  # word of ``control``: not 0 asks the worker to end
CAPTURE = 1  # word of ``control``: not 0 asks for copies of packets (``capture``)
STAGED = 2  # word of ``control``: not 0 asks the worker to call its stages from Python (``staged``)


@njit
def counters(w):
    """The worker's counters (``observe.counters``); it is their only writer."""
    return view(w.counters_at, WORDS, np.int64)


@njit
def control(w):
    """Words that the supervisor writes."""
    return view(w.control_at, CONTROL_COUNT, np.int64)


@njit
def positions(w):
    """Round-robin positions by service ordinal."""
    return view(w.positions_at, w.positions_count, np.uint32)


@njit
def loads(w):
    """Live flows of this worker by the ordinal of their target's host entry."""
    return view(w.loads_at, w.loads_count, np.uint32)


@njit
def sticky_words(w):
    """The node's table of sticky clients (``balance.sticky``), shared by all its workers."""
    return view(w.sticky_at, w.sticky_count, np.int64)
