"""The outbound stage: packets from local containers, TUN to wire (or to a container of this node).

A batch reads packets one after the other into one buffer, decides, rewrites in place, and appends them to the run;
small packets lie end to end, so that a train of them can be sent without a copy.

1. read       one packet or super-packet with its virtio header
2. classify   and check the virtio header against what the packet really is
3. flow       found, refreshed or opened (``decide``)
4. rewrite    both addresses, checksums incrementally
5. send       to the target's node as one packet, or cut; or deliver here
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane import flow, inbound, libc, merge, rewrite, run, segment
from appliance.dataplane.classify import classify
from appliance.dataplane.decide import outbound_flow
from appliance.dataplane.memory import counters
from appliance.dataplane.native import address_of, le16
from appliance.dataplane.wire import icmp, tcp, udp, vnet
from appliance.observe.counters import COUNTS, FROM_TUN, Count, Drop
from appliance.tables import layout

_MALFORMED, _OK = Drop.MALFORMED.value, Drop.NONE.value
_READS, _PACKETS = COUNTS + Count.TUN_READS.value, COUNTS + Count.TUN_PACKETS.value
_BYTES, _ERRORS = COUNTS + Count.TUN_BYTES.value, COUNTS + Count.TUN_ERRORS.value
_HANDED = COUNTS + Count.HANDED_OVER.value
_READ_MAX = limits.VNET_HEADER + limits.PACKET_MAX
_TCP, _UDP = 6, 17
LOOPBACK_HI, LOOPBACK_LO = layout.words("127.0.0.1")


@njit
def outbound(w, limit):
    """Take up to ``limit`` packets from the TUN; gives how many there were. Fewer than ``limit``: it is empty."""
    state, runs = w.state[0], w.run[0]
    count = 0
    while count < limit:
        if runs.segments == 0:
            runs.base = 0
        elif runs.base + _READ_MAX > limits.READ_BUFFER:
            run.flush(w)
            runs.base = 0
        length = libc.read(w.libc, state.tun, address_of(w.buffer, runs.base), _READ_MAX)
        if length <= 0:
            if length < 0 and libc.errno(w.libc) != libc.EAGAIN:
                counters(w)[_ERRORS] += 1
            break
        count += 1
        packet(w, runs.base, length)
        runs.base += (length + 63) & ~63
    run.flush(w)
    merge.flush(w)
    return count


@njit
def packet(w, at, length):
    """Handle what one read gave: a virtio header at an offset of the buffer, and its packet."""
    p, buffer = w.packet[0], w.buffer
    counters(w)[_READS] += 1
    counters(w)[_BYTES] += length
    ip, size = at + vnet.LENGTH, length - vnet.LENGTH
    kind = np.int64(buffer[at + vnet.GSO_TYPE]) & ~vnet.GSO_ECN if size > 0 else 0
    reason = classify(buffer, ip, size, p, kind == vnet.GSO_UDP_L4)
    if reason == _OK and not _is_sound(buffer, at, p, kind):
        reason = _MALFORMED
    if reason != _OK:
        counters(w)[_PACKETS] += 1
        counters(w)[FROM_TUN + reason] += 1
        return
    segments = _segments(buffer, at, p, kind)
    counters(w)[_PACKETS] += segments
    number = outbound_flow(w, p)
    if number < 0:
        counters(w)[FROM_TUN - number] += segments
        return
    f = flow.records(w)[number]
    f.packets_out += segments
    f.bytes_out += p.length
    flow.touch(f, True, p.tcp_flags, w.state[0].now)
    partial = _is_partial(buffer, at, p)
    rewrite.outbound(buffer, p, f, partial)
    if f.flags & flow.LOCAL:
        _deliver(w, at, p, f, kind, partial)
    elif w.state[0].source_ports:
        fd = w.source_fds[np.int64(f.steer) % w.state[0].source_ports]
        _send(w, at, p, kind, fd, f.node_hi, f.node_lo, np.int64(f.node_port))
    else:
        _send(w, at, p, kind, w.state[0].wire, f.node_hi, f.node_lo, np.int64(f.node_port))


@njit
def _is_sound(buffer, at, p, kind):
    """Whether the virtio header fits the packet; what does not is not carried out."""
    if buffer[at] & vnet.NEEDS_CSUM and not _is_checksum_sound(buffer, at, p):
        return False
    if kind == vnet.GSO_NONE:
        return True
    if le16(buffer, at + vnet.GSO_SIZE) == 0:
        return False
    if kind == vnet.GSO_TCPV4:
        return p.version == 4 and p.protocol == _TCP
    if kind == vnet.GSO_TCPV6:
        return p.version == 6 and p.protocol == _TCP
    return kind == vnet.GSO_UDP_L4 and p.protocol == _UDP


@njit
def _is_checksum_sound(buffer, at, p):
    """Whether the checksum to be finished is the transport's own, or lies in the payload (a tunnel in the container).

    Anywhere else it would overwrite what was judged: addresses, ports, lengths.
    """
    start = le16(buffer, at + vnet.CSUM_START)
    field = start + le16(buffer, at + vnet.CSUM_OFFSET)
    transport = p.l4 - p.at
    own = icmp.CHECKSUM
    if p.protocol == _TCP:
        own = tcp.CHECKSUM
    elif p.protocol == _UDP:
        own = udp.CHECKSUM
    is_own = start == transport and field == transport + own
    return field + 2 <= p.length and (is_own or (start >= transport and field >= p.header))


@njit
def _segments(buffer, at, p, kind):
    """How many packets a read stands for."""
    if kind == vnet.GSO_NONE:
        return np.int64(1)
    size = le16(buffer, at + vnet.GSO_SIZE)
    return max(1, (p.length - p.header + size - 1) // size)


@njit
def _is_partial(buffer, at, p):
    """Whether the transport checksum field holds the pseudo-header's sum only."""
    return (
        buffer[at] & vnet.NEEDS_CSUM != 0
        and p.field != 0
        and p.at + le16(buffer, at + vnet.CSUM_START) == p.l4
        and p.l4 + le16(buffer, at + vnet.CSUM_OFFSET) == p.field
    )


@njit
def _send(w, at, p, kind, fd, node_hi, node_lo, port):
    """Append a rewritten packet, or the segments of a super-packet, to the run for a socket and node."""
    buffer = w.buffer
    if kind != vnet.GSO_NONE:
        segment.cut(w, buffer, p, le16(buffer, at + vnet.GSO_SIZE), fd, node_hi, node_lo, port)
        return
    if buffer[at] & vnet.NEEDS_CSUM:
        segment.finish(buffer, p, le16(buffer, at + vnet.CSUM_START), le16(buffer, at + vnet.CSUM_OFFSET))
    run.prepare(w, fd, node_hi, node_lo, port, p.length)
    run.add(w, address_of(buffer, p.at), p.length, 0, 0)


@njit
def _deliver(w, at, p, f, kind, partial):
    """Bring a packet to a container of this node: through this worker's own inbound side, or its owner's."""
    state = w.state[0]
    if np.int64(f.steer) % state.workers != state.index:
        counters(w)[_HANDED] += 1
        _send(w, at, p, kind, state.handoff, LOOPBACK_HI, LOOPBACK_LO, state.port)
        return
    inbound.deliver_super(w, at, p, partial)

