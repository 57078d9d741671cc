"""Policies: which place of a ServiceIP's choice list a new flow tries first.

The interface: a policy is a module with one compiled function

    first(w, p, entry) -> place     w: the worker's record; p: the packet; entry: the service's table entry, with at
                                    least one place; the place lies in 0 … count - 1

and, where it has to learn what became of it, ``opened(w, entry)``, called when the flow was opened. It reads the
worker's own state, the packet and the tables, and writes nothing but the worker's own state, so no policy needs to
know another, and none needs a lock. It does not know whether the choice can be used: the caller walks on from it, by
``place``, until one can.

| module | policy | state |
|---|---|---|
| ``round_robin`` | ``rr``, ``instance``, and ``closest`` among the near places | a position a ServiceIP |
| ``least_flows`` | ``least-flows`` | live flows a backend |
| ``maglev`` | ``maglev`` | none: a table of the ServiceIP's, made by the supervisor |
| ``sticky`` | asked before any policy, where a ServiceIP has it | a table that the workers of a node share |

Weights need no code here: a place stands in the list, or in the table, as often as its weight says; an instance that
is drained or down stands in none. ``closest`` needs little: the supervisor, who measures, puts the near places first
and says how many they are (``near``).
"""

import numpy as np
from numba import njit

from appliance.dataplane.balance import least_flows, maglev, round_robin
from appliance.tables.layout import POLICY_LEAST_FLOWS, POLICY_MAGLEV


@njit
def first(w, p, entry):
    """The place that the ServiceIP's policy wants for a new flow."""
    if entry.policy == POLICY_MAGLEV:
        return maglev.first(w, p, entry)
    if entry.policy == POLICY_LEAST_FLOWS:
        return least_flows.first(w, p, entry)
    return round_robin.first(w, p, entry)


@njit
def place(entry, start, step):
    """The place that is tried in step 0, 1, … count - 1: round the near ones from ``start``, then on to the others."""
    near = np.int64(entry.near)
    return (start + step) % near if step < near else np.int64(step)


@njit
def opened(w, entry):
    """A flow was opened by the policy's choice."""
    if entry.policy != POLICY_MAGLEV and entry.policy != POLICY_LEAST_FLOWS:
        round_robin.opened(w, entry)
