"""Is a packet's source where it came from? The check that an open decapsulator lacks (CVE-2020-10136, CVE-2025-23018).

A datagram from the underlay is believed only if the node that sent it may speak for the packet inside:

1. The tables have the inner source at the node that sent the datagram, and that is not this one: it may.
2. Otherwise the sender must at least be a node of the cluster (``unknown-peer``; ``tunnel.learn_hosts`` = any waives
   that), and must not claim what the tables have elsewhere or here (``peer-spoof``).
3. What the tables do not have must be an address of the overlay that nobody else can have: no ServiceIP, none of ours
   (``peer-spoof``; with ``tunnel.learn_hosts`` = off always).

What passed is remembered (``learn``) and good for all packets until the tables change.
"""

from numba import njit

from appliance import limits
from appliance.dataplane import learn
from appliance.dataplane.decide import host_of
from appliance.dataplane.flow import LOCAL
from appliance.dataplane.reply import gateway
from appliance.observe.counters import Drop
from appliance.tables.layout import HOST_LOCAL
from appliance.tables.read import find_node, find_service, hosts, in_overlay, nodes

KNOWN, ANY, OFF = range(3)  # ``tunnel.learn_hosts``
MODES = {"known": KNOWN, "any": ANY, "off": OFF}
_OK, _UNKNOWN_PEER, _SPOOF = Drop.NONE.value, Drop.UNKNOWN_PEER.value, Drop.PEER_SPOOF.value


@njit
def is_from(w, f):
    """Whether the datagram at hand came from the node of a flow's target, as the tables have it now."""
    state = w.state[0]
    if f.epoch != state.epoch or f.flags & LOCAL:
        return False
    return f.node_lo == state.outer_lo and f.node_hi == state.outer_hi


@njit
def is_peer(w):
    """Whether the datagram at hand came from a node of the cluster, or from whom we listen to all the same."""
    state = w.state[0]
    return state.learn == ANY or find_node(w, state.outer_hi, state.outer_lo) >= 0


@njit
def check_source(w, p):
    """Whether the datagram's sender may speak for the packet's source; gives a ``Drop`` reason, 0 if it may."""
    state = w.state[0]
    number = learn.find(w, p.source_hi, p.source_lo)
    if number >= 0:
        entry = w.learned[number]
        if entry.epoch == state.epoch and entry.node_lo == state.outer_lo and entry.node_hi == state.outer_hi:
            entry.deadline = state.now + limits.LEARNED_NS
            return _OK
    return _check_tables(w, p)


@njit
def _check_tables(w, p):
    state = w.state[0]
    host = host_of(w, p.source_hi, p.source_lo)
    node = find_node(w, state.outer_hi, state.outer_lo)
    if host >= 0:
        h = hosts(w)[host]
        if not h.flags & HOST_LOCAL and h.node_lo == state.outer_lo and h.node_hi == state.outer_hi:
            _remember(w, p, node, h.port)
            return _OK
    if node < 0 and state.learn != ANY:
        return _UNKNOWN_PEER
    if host >= 0 or state.learn == OFF or not _is_free(w, p):
        return _SPOOF
    _remember(w, p, node, nodes(w)[node].port if node >= 0 else state.port)
    return _OK


@njit
def _is_free(w, p):
    """Whether an address that no table has may be somebody's container."""
    gateway_hi, gateway_lo = gateway(w, p.version)
    if p.source_lo == gateway_lo and p.source_hi == gateway_hi:
        return False
    return in_overlay(w, p.source_hi, p.source_lo) and find_service(w, p.source_hi, p.source_lo) < 0


@njit
def _remember(w, p, node, port):
    state = w.state[0]
    flags = nodes(w)[node].flags if node >= 0 else 0
    learn.put(w, p.source_hi, p.source_lo, state.outer_hi, state.outer_lo, port, flags)
    if state.waiting > 0:
        state.next_settle = 0  # packets may have waited for this address
