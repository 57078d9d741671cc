"""Maglev tables: which of a ServiceIP's backends a client's slot belongs to.

Each backend has a permutation of all slots, given by its address alone. The backends take turns, each taking its next
slot that is still free, until none is (Eisenbud et al., "Maglev", NSDI 2016, section 3.4). A weight is the share of the
turns: a backend of half the greatest weight takes every second one. So every node makes the same table of the same
backends, and a backend that leaves gives its slots to the others and moves few of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from appliance.tables import layout
from appliance.tables.layout import IPAddress
from appliance.tables.read import mix

_EMPTY = 0xFFFF


def slots(backends: Sequence[IPAddress], weights: Sequence[int]) -> Any:
    """For each of ``layout.MAGLEV_SLOTS`` slots an index into ``backends``, as uint16.

    ``backends`` are at least one and different, in an order that all nodes share; weights are positive.
    """
    words = np.array([layout.words(address) for address in backends], dtype=np.int64)
    table = np.full(layout.MAGLEV_SLOTS, _EMPTY, dtype=np.uint16)
    _fill(words, np.array(weights, dtype=np.int64), table)
    return table


@njit(cache=True)
def _fill(words, weights, table):
    count, size, top = len(words), len(table), weights.max()
    at, skip = np.empty(count, np.int64), np.empty(count, np.int64)
    credit = np.zeros(count, np.int64)
    for i in range(count):
        at[i] = mix(words[i, 0], words[i, 1], layout.MAGLEV_OFFSET) % size
        skip[i] = mix(words[i, 0], words[i, 1], layout.MAGLEV_SKIP) % (size - 1) + 1
    taken = 0
    while True:
        for i in range(count):
            credit[i] += weights[i]
            if credit[i] < top:
                continue
            credit[i] -= top
            while table[at[i]] != _EMPTY:
                at[i] = (at[i] + skip[i]) % size
            table[at[i]] = i
            taken += 1
            if taken == size:
                return
