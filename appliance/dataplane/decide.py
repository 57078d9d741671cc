"""Where a flow goes: the one place in which tables become a decision.

A decision is taken when a container opens a flow, and again when the tables have changed in a way that concerns it.
It is stored whole in the flow's record; packets only carry it out.
"""

import numpy as np
from numba import njit

from appliance.dataplane import balance, flow, learn, misses
from appliance.dataplane.balance import sticky
from appliance.dataplane.memory import counters
from appliance.dataplane.steering import steer
from appliance.dataplane.wire import tcp
from appliance.dataplane.wire.checksum import delta, fold
from appliance.observe.counters import COUNTS, Count, Drop
from appliance.tables.layout import HOST_LOCAL, NODE_OURS, POLICY_INSTANCE
from appliance.tables.read import (
    choices,
    find_host,
    find_node,
    find_service,
    hosts,
    in_service_range,
    nodes,
    services,
)

_SPOOFED, _NO_ROUTE = Drop.SPOOFED_SOURCE.value, Drop.NO_ROUTE.value
_UNKNOWN, _NO_INSTANCE = Drop.UNKNOWN_SERVICE.value, Drop.NO_INSTANCE.value
_REVERSE, _FULL = Drop.REVERSE_IN_USE.value, Drop.FLOW_TABLE_FULL.value
_OPENED, _MOVED = COUNTS + Count.FLOWS_OPENED.value, COUNTS + Count.FLOWS_MOVED.value
_ANY_SIZE = 65_535
_OVERHEAD_V4, _OVERHEAD_V6 = 28, 48  # IP and UDP headers of the underlay
_EVICTED, _LIVE = COUNTS + Count.FLOWS_EVICTED.value, COUNTS + Count.FLOWS_LIVE.value


@njit
def outbound_flow(w, p):
    """Number of the flow of a packet from a container, decided as of the current tables; or minus a ``Drop`` reason.

    A connection that was closed and is opened again from the same port is another one (RFC 9293 section 3.6.1, and
    nf_conntrack_proto_tcp.c): its instance is chosen anew.
    """
    number = flow.find(
        w,
        flow.OUTBOUND,
        p.source_hi,
        p.source_lo,
        p.destination_hi,
        p.destination_lo,
        p.source_port,
        p.destination_port,
        p.protocol,
    )
    if number >= 0:
        if p.tcp_flags & (tcp.SYN | tcp.ACK) == tcp.SYN and flow.records(w)[number].state == flow.CLOSING:
            flow.remove(w, number)
        elif is_current(w, number):
            return number
        else:
            flow.remove(w, number)
            counters(w)[_MOVED] += 1
    return _open(w, p)


@njit
def is_current(w, number):
    """Whether a flow may go on as it is: its instance, and its own container, are still those that it began with."""
    return flow.records(w)[number].epoch == w.state[0].epoch or _refresh(w, number)


@njit
def _refresh(w, number):
    """Compare a flow with tables that changed; False if its instance, or its own container, is gone."""
    f = flow.records(w)[number]
    own = find_host(w, f.local_hi, f.local_lo)
    if f.flags & flow.LEARNED:
        return _refresh_learned(w, f, own)
    target = find_host(w, f.target_hi, f.target_lo)
    if own < 0 or target < 0:
        return False
    own_host, host = hosts(w)[own], hosts(w)[target]
    if own_host.generation != f.local_generation or host.generation != f.generation:
        return False
    if not own_host.flags & HOST_LOCAL or not _is_offered(w, f):
        return False
    _set_node(w, f, host)
    f.epoch = w.state[0].epoch
    return True


@njit
def _refresh_learned(w, f, own):
    """A flow to a learned host stays until the tables have the address themselves."""
    if own < 0 or hosts(w)[own].generation != f.local_generation or not hosts(w)[own].flags & HOST_LOCAL:
        return False
    if find_service(w, f.dialled_hi, f.dialled_lo) >= 0:
        return False
    number = learn.find(w, f.dialled_hi, f.dialled_lo)
    if number >= 0:
        _set_learned_node(w, f, w.learned[number])
    f.epoch = w.state[0].epoch
    return True


@njit
def _is_offered(w, f):
    """Whether a flow may keep an instance that its ServiceIP gives to nobody any more: a TCP connection may.

    The choice list is searched only if an instance has left it since the last time.
    """
    if f.protocol == flow.TCP or f.flags & flow.DIRECT:
        return True
    service = find_service(w, f.dialled_hi, f.dialled_lo)
    if service < 0:
        return False
    entry = services(w)[service]
    if f.offered == entry.generation:
        return True
    for place in range(np.int64(entry.count)):
        choice = choices(w)[np.int64(entry.choices) + place]
        if choice.address_lo == f.target_lo and choice.address_hi == f.target_hi:
            f.offered = entry.generation
            return True
    return False


@njit
def _set_node(w, f, host):
    """Where the target is; may change while the instance lives (a node gets another address)."""
    f.node_hi, f.node_lo, f.node_port = host.node_hi, host.node_lo, host.port
    f.flags = (f.flags & ~flow.LOCAL) | (flow.LOCAL if host.flags & HOST_LOCAL else 0)
    f.mtu = _ANY_SIZE if f.flags & flow.LOCAL else path_mtu(w, f.node_hi, f.node_lo)


@njit
def _set_learned_node(w, f, learned):
    f.node_hi, f.node_lo, f.node_port = learned.node_hi, learned.node_lo, learned.port
    f.mtu = path_mtu(w, f.node_hi, f.node_lo)


@njit
def path_mtu(w, hi, lo):
    """The largest packet that fits into a datagram to a node; where the path is unknown, any."""
    number = find_node(w, hi, lo)
    if number < 0 or nodes(w)[number].mtu == 0:
        return np.int64(_ANY_SIZE)
    overhead = _OVERHEAD_V4 if hi == 0 else _OVERHEAD_V6
    return min(np.int64(_ANY_SIZE), np.int64(nodes(w)[number].mtu) - overhead)


@njit
def _open(w, p):
    """Decide a new flow; its number, or minus a ``Drop`` reason."""
    own = find_host(w, p.source_hi, p.source_lo)
    if own < 0 or not hosts(w)[own].flags & HOST_LOCAL:
        return -_SPOOFED
    if misses.is_waited_for(w, p.destination_hi, p.destination_lo):
        return -_UNKNOWN
    service = find_service(w, p.destination_hi, p.destination_lo)
    if service >= 0:
        return _open_service(w, p, own, service)
    target = find_host(w, p.destination_hi, p.destination_lo)
    if target >= 0:
        return _enter(w, p, own, target, False, 0)
    if not in_service_range(w, p.destination_hi, p.destination_lo):
        return -_NO_ROUTE
    learned = learn.find(w, p.destination_hi, p.destination_lo)
    if learned >= 0 and w.learned[learned].flags & NODE_OURS:
        return _enter_learned(w, p, own, w.learned[learned])
    return -_UNKNOWN


@njit
def _open_service(w, p, own, service):
    """Take the instance that the client had, or walk the choice list from the policy's place to one of use."""
    entry = services(w)[service]
    if entry.count == 0:
        return -_NO_INSTANCE
    kept = sticky.find(w, p, entry)
    number = _open_place(w, p, own, entry, kept) if kept >= 0 else np.int64(-_NO_INSTANCE)
    is_taken = number == -_REVERSE  # for these ports alone: the client keeps it for others
    if number < 0 and number != -_FULL:
        number = _open_by_policy(w, p, own, entry)
    if number >= 0 and not is_taken:
        f = flow.records(w)[number]
        sticky.keep(w, p, entry, f.target_hi, f.target_lo)
    return number


@njit
def _open_by_policy(w, p, own, entry):
    start = balance.first(w, p, entry)
    reason = _NO_INSTANCE
    for step in range(np.int64(entry.count)):
        number = _open_place(w, p, own, entry, balance.place(entry, start, step))
        if number >= 0:
            balance.opened(w, entry)
            return number
        if number == -_FULL:
            return number
        if number == -_REVERSE:
            reason = _REVERSE
    return np.int64(-reason)


@njit
def _open_place(w, p, own, entry, place):
    """Open a flow to the instance at a place; minus a ``Drop`` reason if it cannot be used."""
    choice = choices(w)[np.int64(entry.choices) + place]
    target = find_host(w, choice.address_hi, choice.address_lo)
    if target < 0:
        return np.int64(-_NO_INSTANCE)
    peer_hi, peer_lo = peer_of(hosts(w)[target])
    if not _is_reverse_free(w, p, peer_hi, peer_lo):
        return np.int64(-_REVERSE)
    return _enter(w, p, own, target, True, entry.generation)


@njit
def peer_of(host):
    """From which address a host's answers come: its instance IP, or its own if it has none."""
    if host.instance_lo == 0 and host.instance_hi == 0:
        return host.address_hi, host.address_lo
    return host.instance_hi, host.instance_lo


@njit
def _is_reverse_free(w, p, peer_hi, peer_lo):
    """Whether no live flow of this container and port pair has this peer: answers could not be told apart."""
    number = flow.find(
        w,
        flow.INBOUND,
        p.source_hi,
        p.source_lo,
        peer_hi,
        peer_lo,
        p.source_port,
        p.destination_port,
        p.protocol,
    )
    if number >= 0 and flow.records(w)[number].deadline <= w.state[0].now:
        flow.remove(w, number)
        return True
    return number < 0


@njit
def _enter(w, p, own, target, translate, offered):
    """Write the decision for a known target into a record; the flow's number, or minus a ``Drop`` reason."""
    number = _begin(w, p, own)
    if number < 0:
        return number
    f, host = flow.records(w)[number], hosts(w)[target]
    f.target_hi, f.target_lo = host.address_hi, host.address_lo
    if translate:
        f.source_hi, f.source_lo = peer_of(hosts(w)[own])
        f.peer_hi, f.peer_lo = peer_of(host)
    f.flags = 0 if translate else flow.DIRECT
    f.generation, f.backend, f.offered = host.generation, host.ordinal, offered
    _set_node(w, f, host)
    _finish(w, number)
    return number


@njit
def _enter_learned(w, p, own, learned):
    """Write the decision for an instance IP that no table has: it goes to its node as it is."""
    number = _begin(w, p, own)
    if number < 0:
        return number
    f = flow.records(w)[number]
    f.target_hi, f.target_lo = p.destination_hi, p.destination_lo
    f.source_hi, f.source_lo = peer_of(hosts(w)[own])
    f.flags, f.generation, f.backend, f.offered = flow.LEARNED, 0, w.loads_count - 1, 0
    _set_learned_node(w, f, learned)
    _finish(w, number)
    return number


@njit
def _begin(w, p, own):
    """A record with what a packet alone tells, as if nothing were rewritten; or minus a ``Drop`` reason."""
    if w.free_count == 0:
        counters(w)[_EVICTED] += 1
    number = flow.allocate(w, w.state[0].now)
    if number < 0:
        counters(w)[_EVICTED] -= 1
        return np.int64(-_FULL)
    f = flow.records(w)[number]
    _match(f, p)
    f.source_hi, f.source_lo = p.source_hi, p.source_lo
    f.peer_hi, f.peer_lo = p.destination_hi, p.destination_lo
    f.local_generation = hosts(w)[own].generation
    return number


@njit
def _finish(w, number):
    """Derive the rest of a decision, and make it visible."""
    f = flow.records(w)[number]
    _deltas(f)
    if f.peer_lo != f.dialled_lo or f.peer_hi != f.dialled_hi:
        f.flags |= flow.TRANSLATES
    f.steer = steer(f.target_hi, f.target_lo, np.int64(f.local_port), np.int64(f.remote_port))
    f.packets_out, f.packets_in, f.bytes_out, f.bytes_in = 0, 0, 0, 0
    f.epoch, f.deadline = w.state[0].epoch, w.state[0].now
    flow.commit(w, number, flow.OPENING)
    counters(w)[_OPENED] += 1
    counters(w)[_LIVE] = flow.live(w)


@njit
def _match(f, p):
    f.local_hi, f.local_lo = p.source_hi, p.source_lo
    f.dialled_hi, f.dialled_lo = p.destination_hi, p.destination_lo
    f.local_port, f.remote_port, f.protocol = p.source_port, p.destination_port, p.protocol


@njit
def _deltas(f):
    """What the rewrites add to checksums, both ways."""
    f.delta_out = fold(
        delta(f.local_hi, f.local_lo, f.source_hi, f.source_lo)
        + delta(f.dialled_hi, f.dialled_lo, f.target_hi, f.target_lo)
    )
    f.delta_in = delta(f.peer_hi, f.peer_lo, f.dialled_hi, f.dialled_lo)


@njit
def inbound_flow(w, p):
    """Number of the flow that a packet for a local container answers, or -1 if it answers none."""
    return flow.find(
        w,
        flow.INBOUND,
        p.destination_hi,
        p.destination_lo,
        p.source_hi,
        p.source_lo,
        p.destination_port,
        p.source_port,
        p.protocol,
    )


@njit
def is_local(w, hi, lo):
    """Whether an address belongs to a container of this node."""
    host = find_host(w, hi, lo)
    return host >= 0 and hosts(w)[host].flags & HOST_LOCAL != 0


@njit
def host_of(w, hi, lo):
    """Index of the host entry that an address belongs to, be it a namespace address or an instance IP; or -1."""
    number = find_host(w, hi, lo)
    if number >= 0:
        return number
    service = find_service(w, hi, lo)
    if service < 0:
        return np.int64(-1)
    entry = services(w)[service]
    if entry.policy != POLICY_INSTANCE or entry.count == 0:
        return np.int64(-1)
    choice = choices(w)[np.int64(entry.choices)]
    return find_host(w, choice.address_hi, choice.address_lo)
