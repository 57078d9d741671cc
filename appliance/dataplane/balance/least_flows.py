"""Least flows: the better of two places drawn at random, by live flows for each unit of weight.

Two random choices are nearly as even as looking at all, cost two look-ups, and unlike "the least loaded" do not send
every worker to the same instance (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). A
worker counts its own flows only (``flow`` does), by the ordinal of the backend's host entry. A place whose host is in
no table counts as the worse one.
"""

import numpy as np
from numba import njit

from appliance.dataplane.memory import loads
from appliance.tables.read import choices, find_host, hosts, mix


@njit
def first(w, p, entry):
    """Of two different places, the one with fewer flows for its weight; the first one drawn if they are even."""
    count = np.int64(entry.count)
    if count == 1:
        return np.int64(0)
    state = w.state[0]
    drawn = mix(state.random, state.index, w.flow_seed)
    state.random += 1
    one = drawn % count
    other = (one + 1 + (drawn >> np.int64(32)) % (count - 1)) % count
    load, other_load = _load(w, entry, one), _load(w, entry, other)
    if other_load < 0:
        return one
    if load < 0:
        return other
    weight, other_weight = _weight(w, entry, one), _weight(w, entry, other)
    return other if other_load * weight < load * other_weight else one


@njit
def _load(w, entry, place):
    """Live flows of this worker to a place's backend; -1 if that is no host."""
    choice = choices(w)[np.int64(entry.choices) + place]
    host = find_host(w, choice.address_hi, choice.address_lo)
    return np.int64(loads(w)[hosts(w)[host].ordinal]) if host >= 0 else np.int64(-1)


@njit
def _weight(w, entry, place):
    return np.int64(choices(w)[np.int64(entry.choices) + place].weight)
