"""Policies: which place of a ServiceIP's choice list a new flow tries first.

A policy is one function of the worker's own state and the flow; it touches nothing else. The caller walks on from
that place while the choice cannot be used.
"""

import numpy as np
from numba import njit


@njit
def round_robin(positions, ordinal, count):
    """The next place in turn. Each worker turns on its own, from a start of its own (its index)."""
    return np.int64(positions[ordinal]) % count


@njit
def advance(positions, ordinal):
    """A flow was opened: the next one gets the next place."""
    positions[ordinal] += 1
