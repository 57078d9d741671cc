"""Sticky: a client that comes back within the ServiceIP's time gets the instance that it had.

Theory of operation
-------------------
One table a node, mapped by all its workers, as the flows of one client are spread over them. ``limits.STICKY_ENTRIES``
entries of a cache line each, in sets of ``WAYS``; client and ServiceIP give the set. An entry holds client, ServiceIP,
target, deadline and a checksum over them.

There is no lock and no owner: any worker reads and writes any entry at any time, word by word. An entry that was
written by two at once, or is being written, has a checksum that does not fit, and counts as missing; the worst that
can happen is that a client is balanced anew. A full set gives up the entry that would have ended first.

The time runs from the client's last new flow. An instance that is drained, down or gone is no longer in the choice
list, and its entries count as missing.
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane.memory import sticky_words
from appliance.tables.read import choices, mix

WAYS = 4
WORDS = 8  # of an entry
SECTIONS = [("sticky", np.dtype(np.int64), limits.STICKY_ENTRIES * WORDS)]
_CLIENT_HI, _CLIENT_LO, _SERVICE_HI, _SERVICE_LO, _TARGET_HI, _TARGET_LO, _DEADLINE, _CHECK = range(WORDS)
_SETS = limits.STICKY_ENTRIES // WAYS


@njit
def find(w, p, entry):
    """The place of the instance that the packet's client had last, or -1."""
    if entry.sticky == 0:
        return np.int64(-1)
    words, base = sticky_words(w), _set(p, entry)
    for way in range(WAYS):
        at = base + way * WORDS
        if not _is_for(words, at, p, entry):
            continue
        target_hi, target_lo, deadline = words[at + _TARGET_HI], words[at + _TARGET_LO], words[at + _DEADLINE]
        if words[at + _CHECK] == _check(p, entry, target_hi, target_lo, deadline) and deadline > w.state[0].now:
            return _place(w, entry, target_hi, target_lo)
    return np.int64(-1)


@njit
def keep(w, p, entry, target_hi, target_lo):
    """Remember the target for the client, for the ServiceIP's time from now."""
    if entry.sticky == 0:
        return
    words, now = sticky_words(w), w.state[0].now
    at = _victim(words, p, entry)
    deadline = now + np.int64(entry.sticky) * limits.SECOND
    words[at + _CLIENT_HI], words[at + _CLIENT_LO] = p.source_hi, p.source_lo
    words[at + _SERVICE_HI], words[at + _SERVICE_LO] = entry.address_hi, entry.address_lo
    words[at + _TARGET_HI], words[at + _TARGET_LO] = target_hi, target_lo
    words[at + _DEADLINE] = deadline
    words[at + _CHECK] = _check(p, entry, target_hi, target_lo, deadline)


@njit
def _set(p, entry):
    """Where the set of a client and ServiceIP begins."""
    hashed = mix(mix(p.source_hi, p.source_lo, entry.address_hi), entry.address_lo, 0)
    return (hashed % _SETS) * (WAYS * WORDS)


@njit
def _check(p, entry, target_hi, target_lo, deadline):
    """Checksum of an entry; never the zero of an entry that was never written."""
    client = mix(p.source_hi, p.source_lo, entry.address_hi)
    return mix(mix(client, target_hi, entry.address_lo), target_lo, deadline) | 1


@njit
def _is_for(words, at, p, entry):
    return (
        words[at + _CLIENT_LO] == p.source_lo
        and words[at + _CLIENT_HI] == p.source_hi
        and words[at + _SERVICE_LO] == entry.address_lo
        and words[at + _SERVICE_HI] == entry.address_hi
    )


@njit
def _victim(words, p, entry):
    """The client's own entry, or the one of its set that ends first."""
    base = _set(p, entry)
    victim = base
    for way in range(WAYS):
        at = base + way * WORDS
        if _is_for(words, at, p, entry):
            return at
        if words[at + _DEADLINE] < words[victim + _DEADLINE]:
            victim = at
    return victim


@njit
def _place(w, entry, target_hi, target_lo):
    """The first place of a backend in the choice list, or -1."""
    start = np.int64(entry.choices)
    for place in range(np.int64(entry.count)):
        choice = choices(w)[start + place]
        if choice.address_lo == target_lo and choice.address_hi == target_hi:
            return np.int64(place)
    return np.int64(-1)
