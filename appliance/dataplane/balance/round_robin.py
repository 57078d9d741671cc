"""Round robin: the places of the list in turn, or for ``closest`` the near ones.

Each worker turns on its own, from a start of its own (its index), so that workers do not all begin with the same
instance. A flow that could not be opened uses no turn.
"""

import numpy as np
from numba import njit

from appliance.dataplane.memory import positions


@njit
def first(w, p, entry):
    """The next place in turn."""
    return np.int64(positions(w)[entry.ordinal]) % np.int64(entry.near)


@njit
def opened(w, entry):
    """The next flow gets the next place."""
    positions(w)[entry.ordinal] += 1
