"""The outbound stage: packets from local containers, TUN to wire (or to a container of this node).

A batch reads packets one after the other into one buffer, decides, rewrites in place, and appends them to the run;
small packets lie end to end, so that a train of them can be sent without a copy. Beside a small packet the next one is
read ahead, so that the one at hand finds its flow in the cache (``foresight``).

1. read       one packet or super-packet with its virtio header
2. classify   and check the virtio header against what the packet really is
3. whole      a fragment is kept until its datagram is whole (``fragment``); then, and where the kernel could not tell
              whose flow a packet is, it goes to the worker that owns it (``handed``)
4. flow       found, refreshed or opened (``decide``); a packet to an address that nobody told us of waits (``misses``)
5. size       what the path to the node does not take is refused with its MTU, as a router would
6. rewrite    both addresses, checksums incrementally
7. send       to the target's node as one packet, or cut; or deliver here
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane import (
    capture,
    error,
    flow,
    foresight,
    fragment,
    handed,
    inbound,
    learn,
    libc,
    merge,
    misses,
    reply,
    rewrite,
    run,
    segment,
    stages,
)
from appliance.dataplane.classify import ERROR, FRAGMENT, ICMP, TCP, UDP, WHOLE, classify
from appliance.dataplane.decide import host_of, is_local, outbound_flow, peer_of
from appliance.dataplane.memory import counters
from appliance.dataplane.native import address_of, be16, le16, put_be16
from appliance.dataplane.steering import steer
from appliance.dataplane.wire import icmp, ipv4, tcp, vnet
from appliance.dataplane.wire.checksum import adjust, swap
from appliance.observe.counters import COUNTS, FROM_TUN, Count, Drop, Stage
from appliance.tables import layout
from appliance.tables.layout import HOST_LOCAL, NODE_OURS
from appliance.tables.read import find_host, hosts

_MALFORMED, _OK = Drop.MALFORMED.value, Drop.NONE.value
_SPOOFED, _TOO_BIG = Drop.SPOOFED_SOURCE.value, Drop.TOO_BIG.value
_UNKNOWN = Drop.UNKNOWN_SERVICE.value
_NO_FLOW = Drop.ICMP_NO_FLOW.value
_READ, _OUTBOUND = Stage.READ.value, Stage.OUTBOUND.value
_READS, _PACKETS = COUNTS + Count.TUN_READS.value, COUNTS + Count.TUN_PACKETS.value
_BYTES, _ERRORS = COUNTS + Count.TUN_BYTES.value, COUNTS + Count.TUN_ERRORS.value
_HANDED = COUNTS + Count.HANDED_OVER.value
_READ_MAX = limits.VNET_HEADER + limits.PACKET_MAX
_ANY_SIZE = 65_535
LOOPBACK_HI, LOOPBACK_LO = layout.words("127.0.0.1")


@njit
def reserve(w):
    """Make room in the read buffer for a packet of any size; gives its place."""
    if w.run_open == 0:
        w.read_base = 0
    elif w.read_base + _READ_MAX > limits.READ_BUFFER:
        run.flush(w)
        w.read_base = 0
    return w.read_base


@njit
def outbound(w, limit):
    """Take up to ``limit`` packets from the TUN; gives how many there were. Fewer than ``limit``: it is empty."""
    count, at, length, hashed = 0, 0, np.int64(0), np.int64(-1)
    while True:
        if length <= 0:
            if count == limit:
                break
            at = reserve(w)
            length = _read(w, at)
            if length <= 0:
                break
            count += 1
            hashed = foresight.outbound(w, w.buffer, at + vnet.LENGTH, length - vnet.LENGTH)
        ahead, following, foreseen, is_empty = at + _aligned(length), np.int64(0), np.int64(-1), False
        if hashed >= 0 and count < limit and ahead + _READ_MAX <= limits.READ_BUFFER:
            flow.approach(w, hashed)
            following = _read(w, ahead)
            is_empty = following <= 0
            if not is_empty:
                count += 1
                foreseen = foresight.outbound(w, w.buffer, ahead + vnet.LENGTH, following - vnet.LENGTH)
        _take(w, at, length)
        if is_empty:
            break
        at, length, hashed = ahead, following, foreseen
    run.flush(w)
    merge.flush(w)
    return count


@njit
def _read(w, at):
    """Read the next packet with its virtio header to a place of the buffer; its length, or not above 0: none."""
    stages.enter(w, _READ)
    length = libc.read(w.libc, w.state[0].tun, address_of(w.buffer, at), _READ_MAX)
    stages.enter(w, _OUTBOUND)
    if length > 0:
        counters(w)[_READS] += 1
        counters(w)[_BYTES] += length
    elif length < 0 and libc.errno(w.libc) != libc.EAGAIN:
        counters(w)[_ERRORS] += 1
    return length


@njit
def _take(w, at, length):
    """Handle what was read to a place; what is noted of it is noted before it is rewritten."""
    noted = np.int64(-1)
    if w.state[0].capturing:
        came = address_of(w.buffer, at + vnet.LENGTH)
        noted = capture.arrived(w, capture.FROM_CONTAINER, came, length - vnet.LENGTH)
    accept(w, at, length, False, 0)
    if noted >= 0:
        capture.judged(w, noted)


@njit
def _aligned(length):
    return (length + 63) & ~63


@njit
def accept(w, at, length, passed_on, piece):
    """Handle a packet at a reserved place of the read buffer, and keep that place as long as the run needs it.

    ``piece``: not 0 if it was put together from pieces of this size.
    """
    used = packet(w, at, length, passed_on, piece)
    w.read_base = at + _aligned(used)


@njit
def packet(w, at, length, passed_on, piece):
    """Handle a virtio header at an offset of the buffer, and its packet; gives how many bytes of the buffer it took."""
    p, buffer = w.packet[0], w.buffer
    ip, size = at + vnet.LENGTH, length - vnet.LENGTH
    kind = np.int64(buffer[at + vnet.GSO_TYPE]) & ~vnet.GSO_ECN if size > 0 else np.int64(0)
    reason = classify(buffer, ip, size, p, kind == vnet.GSO_UDP_L4)
    if reason == _OK and not _is_sound(buffer, at, p, kind):
        reason = _MALFORMED
    if reason != _OK:
        counters(w)[_PACKETS] += 1
        counters(w)[FROM_TUN + reason] += 1
        return length
    p.piece = piece
    if p.kind == FRAGMENT:
        length = _collect(w, at, p, length)
        if p.kind == FRAGMENT:
            return length
    if (p.extended or p.piece or p.kind == ERROR) and not passed_on and _pass_on(w, at, p, length):
        return length
    if p.kind == ERROR:
        counters(w)[_PACKETS] += 1
        _send_error(w, at, p)
        return length
    _carry(w, at, p, kind, length)
    return length


@njit
def _collect(w, at, p, length):
    """Keep a fragment. If it makes its datagram whole, that takes its place: ``p`` is no fragment any more then."""
    buffer = w.buffer
    counters(w)[_PACKETS] += 1
    if not is_local(w, p.source_hi, p.source_lo):
        counters(w)[FROM_TUN + _SPOOFED] += 1
        return length
    number = fragment.collect(w, buffer, p, FROM_TUN)
    if number < 0:
        return length
    for i in range(vnet.LENGTH):
        buffer[at + i] = 0
    size = fragment.assemble(w, number, buffer, at + vnet.LENGTH)
    reason = classify(buffer, at + vnet.LENGTH, size, p, False)
    if reason == _OK and p.kind != WHOLE:
        reason = _MALFORMED  # fragments within fragments, or an ICMP error, which no path is too narrow for
    if reason != _OK:
        counters(w)[FROM_TUN + reason] += 1
        p.kind = FRAGMENT
    else:
        fragment.remember(w, p)
    return vnet.LENGTH + size


@njit
def _pass_on(w, at, p, length):
    """Give a packet to the sibling that owns its flow; False if it is our own."""
    state = w.state[0]
    if p.kind == ERROR:
        owner = steer(p.inner_destination_hi, p.inner_destination_lo, p.inner_source_port, p.inner_destination_port)
    else:
        owner = steer(p.source_hi, p.source_lo, p.source_port, p.destination_port)
    if owner % state.workers == state.index:
        return False
    handed.pass_on(w, owner % state.workers, misses.FROM_CONTAINER, w.buffer, at, length)
    return True


@njit
def _carry(w, at, p, kind, length):
    """Bring a whole packet, or super-packet, on its way."""
    buffer = w.buffer
    segments = _segments(buffer, at, p, kind)
    counters(w)[_PACKETS] += segments
    number = outbound_flow(w, p)
    if number < 0:
        _refuse(w, at, p, length, segments, -number)
        return
    f = flow.records(w)[number]
    fd = w.state[0].wire
    if w.state[0].source_ports:
        fd = w.source_fds[np.int64(f.steer) % w.state[0].source_ports]
    if f.mtu != _ANY_SIZE and not f.flags & flow.LOCAL:
        fd = _fit(w, at, p, f, kind, fd)
        if fd < 0:
            counters(w)[FROM_TUN + _TOO_BIG] += segments
            return
    f.packets_out += segments
    f.bytes_out += p.length
    flow.touch(f, True, p.tcp_flags, w.state[0].now)
    partial = _is_partial(buffer, at, p)
    rewrite.outbound(buffer, p, f, partial)
    if f.flags & flow.LOCAL:
        _deliver(w, at, p, f, kind, partial, length)
    else:
        _send(w, at, p, kind, fd, f.node_hi, f.node_lo, np.int64(f.node_port))


@njit
def _refuse(w, at, p, length, segments, reason):
    """A packet that no flow takes: it waits if its address may yet become known, or its sender is told.

    Only a sender that is none of ours is told nothing: what would be said goes to whom it claims to be.
    """
    if reason == _UNKNOWN:
        handed.describe(w, misses.FROM_CONTAINER)
        if misses.hold(w, p.destination_hi, p.destination_lo, w.meta, w.buffer, at, length):
            return
    counters(w)[FROM_TUN + reason] += segments
    if reason != _SPOOFED:
        reply.unreachable(w, w.buffer, p, p.length - p.header)


@njit
def reject(w, at, length):
    """A packet that waited for an address that nobody has: count it, and tell its sender."""
    p, buffer = w.packet[0], w.buffer
    kind = np.int64(buffer[at + vnet.GSO_TYPE]) & ~vnet.GSO_ECN
    if classify(buffer, at + vnet.LENGTH, length - vnet.LENGTH, p, kind == vnet.GSO_UDP_L4) != _OK:
        return
    counters(w)[FROM_TUN + _UNKNOWN] += _segments(buffer, at, p, kind)
    reply.unreachable(w, buffer, p, p.length - p.header)


@njit
def _fit(w, at, p, f, kind, fd):
    """From which socket a packet leaves on a path that is narrower than the overlay; -1: not at all, the sender was
    told.

    A TCP connection is told beforehand, by the largest segment that its openings announce (RFC 879's option, as RFC
    4459 section 3.2 has it). What must not be fragmented and does not fit is refused. The rest is fragmented on the
    underlay.
    """
    buffer, mtu = w.buffer, np.int64(f.mtu)
    if p.protocol == TCP and p.tcp_flags & tcp.SYN:
        _clamp(buffer, at, p, mtu)
    size = p.length
    if kind != vnet.GSO_NONE:
        size = min(size, p.header + le16(buffer, at + vnet.GSO_SIZE))
    elif p.piece:
        size = p.piece
    if size <= mtu:
        return fd
    if p.version == 4:
        must_fit = be16(buffer, p.at + ipv4.FRAGMENT) & ipv4.DONT_FRAGMENT != 0
    else:
        must_fit = size > limits.IPV6_MTU_MIN
    if not must_fit and w.state[0].fragmenting >= 0:
        return w.state[0].fragmenting
    reply.too_big(w, buffer, p, mtu)
    return np.int64(-1)


@njit
def _clamp(buffer, at, p, mtu):
    """Lower the maximum segment size that a TCP opening announces to what the path takes."""
    most = mtu - (p.l4 - p.at) - tcp.HEADER_MIN
    option, end = p.l4 + tcp.HEADER_MIN, p.at + p.header
    while option + 1 < end and buffer[option] != tcp.OPTION_END:
        if buffer[option] == tcp.OPTION_NOP:
            option += 1
            continue
        length = np.int64(buffer[option + 1])
        if length < 2 or option + length > end:
            return
        if buffer[option] == tcp.OPTION_MSS and length == tcp.MSS_LENGTH:
            _lower(buffer, at, p, option + 2, most)
            return
        option += length


@njit
def _lower(buffer, at, p, field, most):
    """Replace a larger 16-bit number; a partial checksum does not cover it."""
    now = be16(buffer, field)
    if now <= most:
        return
    put_be16(buffer, field, most)
    if _is_partial(buffer, at, p):
        return
    old, new = swap(now), swap(most)
    if (field - p.l4) & 1:
        old, new = now, most
    adjust(buffer, p.field, (0xFFFF - old) + new)


@njit
def _send_error(w, at, p):
    """Bring an ICMP error to the node whose container sent the packet that it is about, translated (``error``).

    Over IPv6 it may be larger than a narrow path takes (RFC 4443 section 2.4(c): up to 1,280 bytes), and nobody could
    be told to make it smaller: so it is one of those that may be fragmented on the underlay.
    """
    buffer, state = w.buffer, w.state[0]
    if buffer[at] & vnet.NEEDS_CSUM:
        segment.finish(buffer, p, le16(buffer, at + vnet.CSUM_START), le16(buffer, at + vnet.CSUM_OFFSET))
    reason = error.check_outbound(w, buffer, p)
    if reason != _OK:
        counters(w)[FROM_TUN + reason] += 1
        return
    source_hi, source_lo = p.source_hi, p.source_lo
    own = find_host(w, source_hi, source_lo)
    if own >= 0:
        source_hi, source_lo = peer_of(hosts(w)[own])
    number = error.find_outbound(w, p)
    if number >= 0:
        f = flow.records(w)[number]
        error.quote(w, buffer, p, f.peer_hi, f.peer_lo, p.inner_destination_hi, p.inner_destination_lo)
        if f.flags & flow.DIRECT and own >= 0:
            source_hi, source_lo = f.source_hi, f.source_lo
        error.readdress(buffer, p, source_hi, source_lo, f.target_hi, f.target_lo)
        local, node_hi, node_lo, port = f.flags & flow.LOCAL, f.node_hi, f.node_lo, np.int64(f.node_port)
    else:
        host = host_of(w, p.destination_hi, p.destination_lo)
        learned = learn.find(w, p.destination_hi, p.destination_lo)
        if host >= 0:
            h = hosts(w)[host]
            local, node_hi, node_lo, port = np.int64(h.flags) & HOST_LOCAL, h.node_hi, h.node_lo, np.int64(h.port)
            target_hi, target_lo = h.address_hi, h.address_lo
        elif learned >= 0 and w.learned[learned].flags & NODE_OURS:
            entry = w.learned[learned]
            local, node_hi, node_lo, port = np.int64(0), entry.node_hi, entry.node_lo, np.int64(entry.port)
            target_hi, target_lo = p.destination_hi, p.destination_lo
        else:
            counters(w)[FROM_TUN + _NO_FLOW] += 1
            return
        if host >= 0 and target_lo == p.destination_lo and target_hi == p.destination_hi:
            source_hi, source_lo = p.source_hi, p.source_lo  # a namespace address was dialled: nothing is rewritten
        error.readdress(buffer, p, source_hi, source_lo, target_hi, target_lo)
    if local:
        inbound.deliver_error(w, buffer, p, False)
        return
    fd = state.fragmenting if state.fragmenting >= 0 else state.wire
    run.prepare(w, fd, node_hi, node_lo, port, p.length)
    run.add(w, address_of(buffer, p.at), p.length, 0, 0)


@njit
def _is_sound(buffer, at, p, kind):
    """Whether the virtio header fits the packet; what does not is not carried out."""
    if p.kind == FRAGMENT:
        return kind == vnet.GSO_NONE and buffer[at] & vnet.NEEDS_CSUM == 0
    if buffer[at] & vnet.NEEDS_CSUM and not _is_checksum_sound(buffer, at, p):
        return False
    if kind == vnet.GSO_NONE:
        return True
    if le16(buffer, at + vnet.GSO_SIZE) == 0 or p.header > limits.HEADER_MAX or p.extended:
        return False
    if kind == vnet.GSO_TCPV4:
        return p.version == 4 and p.protocol == TCP
    if kind == vnet.GSO_TCPV6:
        return p.version == 6 and p.protocol == TCP
    return kind == vnet.GSO_UDP_L4 and p.protocol == UDP


@njit
def _is_checksum_sound(buffer, at, p):
    """Whether the checksum to be finished is the transport's own, or lies in the payload (a tunnel in the container).

    Anywhere else it would overwrite what was judged: addresses, ports, lengths.
    """
    start = le16(buffer, at + vnet.CSUM_START)
    field = start + le16(buffer, at + vnet.CSUM_OFFSET)
    transport = p.l4 - p.at
    own = p.field - p.at
    if p.protocol == ICMP:
        own = transport + icmp.CHECKSUM
    is_own = start == transport and field == own
    is_beside = p.kind == WHOLE and start >= transport and field >= p.header
    return field + 2 <= p.length and (is_own or is_beside)


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
    if p.piece:
        fragment.send(w, buffer, p, fd, node_hi, node_lo, port)
        return
    if kind != vnet.GSO_NONE:
        segment.cut(w, buffer, p, le16(buffer, at + vnet.GSO_SIZE), fd, node_hi, node_lo, port)
        return
    if buffer[at] & vnet.NEEDS_CSUM:
        segment.finish(buffer, p, le16(buffer, at + vnet.CSUM_START), le16(buffer, at + vnet.CSUM_OFFSET))
    run.prepare(w, fd, node_hi, node_lo, port, p.length)
    run.add(w, address_of(buffer, p.at), p.length, 0, 0)


@njit
def _deliver(w, at, p, f, kind, partial, length):
    """Bring a packet to a container of this node: through this worker's own inbound side, or its owner's."""
    state = w.state[0]
    owner = np.int64(f.steer) % state.workers
    if owner != state.index:
        if p.piece or p.extended:
            handed.pass_on(w, owner, misses.FROM_NODE, w.buffer, p.at, p.length)
            return
        counters(w)[_HANDED] += 1
        _send(w, at, p, kind, state.handoff, LOOPBACK_HI, LOOPBACK_LO, state.port)
        return
    inbound.deliver_super(w, at, p, partial)

