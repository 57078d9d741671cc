"""Maglev: a weighted consistent hash of the client (Eisenbud et al., "Maglev", NSDI 2016, section 3.4).

The client's address, with ``SERVICE_HASH_PORT`` also its port, gives one of ``MAGLEV_SLOTS`` slots, and the slot a
place. The tables of all nodes are the same, and so are these hashes, so a client meets the same instance through any
worker and any node. The hash is therefore not keyed: a client can choose its instance, which it can by the instance
IP anyway.
"""

import numpy as np
from numba import njit

from appliance.tables.layout import MAGLEV_BLOCK, MAGLEV_CLIENT, MAGLEV_SLOTS, SERVICE_HASH_PORT
from appliance.tables.read import maglev_slots, mix


@njit
def first(w, p, entry):
    """The place in the slot of the packet's client."""
    port = (np.int64(p.source_port) & 0xFFFF) + 1 if entry.flags & SERVICE_HASH_PORT else np.int64(0)
    slot = mix(p.source_hi, p.source_lo, MAGLEV_CLIENT + port) % MAGLEV_SLOTS
    return np.int64(maglev_slots(w)[np.int64(entry.table) * MAGLEV_BLOCK + slot])
