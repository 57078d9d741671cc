"""The merge: adjacent segments of one flow, written into the TUN as one super-packet.

The rules are those of the kernel's own GRO (net/ipv4/tcp_offload.c, udp_offload.c, and the self-test
tools/testing/selftests/net/lib/gro.c): every header byte is the same but for lengths, IPv4 identification, sequence,
PSH and checksums; sequence numbers adjoin; no IP options; only ACK, and PSH on the last; all payloads equal but a
shorter last; the checksums of every segment and of its IPv4 header were verified. The identification counts by one, or
stays where DF is set (RFC 6864).

What is merged is compared as it came from the wire (``merge_origin``); the address that ``rewrite.inbound`` restores
is written once, into ``merge_header``. Payloads are gathered where they were received; ``flush`` before those slots
are reused.
"""

from numba import njit

from appliance import limits
from appliance.dataplane import libc, stages
from appliance.dataplane.memory import counters
from appliance.dataplane.native import address_of, be16, be32, copy, le16, put_be16, put_le16
from appliance.dataplane.segment import is_valid
from appliance.dataplane.wire import ipv4, ipv6, tcp, udp, vnet
from appliance.dataplane.wire.checksum import fold, swap, total, words_total
from appliance.observe.counters import COUNTS, FROM_WIRE, Count, Drop, Stage

_TCP, _UDP = 6, 17
_CALLS, _PACKETS = COUNTS + Count.WRITTEN_CALLS.value, COUNTS + Count.WRITTEN_PACKETS.value
_BYTES, _FAILED = COUNTS + Count.WRITTEN_BYTES.value, FROM_WIRE + Drop.TUN_WRITE_FAILED.value
_WRITE = Stage.WRITE.value
_UNKNOWN = -1  # id_step before the second segment


@njit
def can_merge(w, buffer, p):
    """Whether a packet may open or join a merge, by its own header alone."""
    if w.state[0].coalesce == 0 or p.length <= p.header or p.extended:
        return False
    if p.version == 4 and (p.l4 - p.at != ipv4.HEADER_MIN or total(buffer, p.at, ipv4.HEADER_MIN) != 0xFFFF):
        return False
    if p.protocol == _TCP:
        if p.tcp_flags & ~tcp.PSH != tcp.ACK:
            return False
    elif p.protocol != _UDP:
        return False
    return is_valid(buffer, p)


@njit
def joins(w, buffer, p):
    """Whether a packet that can merge continues the open merge."""
    m = w.merge[0]
    payload = p.length - p.header
    if (
        m.segments == 0
        or m.closed
        or p.version != m.version
        or p.protocol != m.protocol
        or p.header != m.header
        or payload > m.size
        or m.segments >= (limits.COALESCE_SEGMENTS if m.protocol == _TCP else limits.UDP_SEGMENTS_MAX)
        or m.header + m.payload + payload > limits.PACKET_MAX
        or m.node_lo != w.state[0].outer_lo
        or m.node_hi != w.state[0].outer_hi
    ):
        return False
    if p.protocol == _TCP and be32(buffer, p.l4 + tcp.SEQUENCE) != m.next_sequence:
        return False
    return _same_header(w.merge_origin, buffer, p) and _follows(m, buffer, p)


@njit
def _same_header(origin, buffer, p):
    """Compare the constant bytes of the header with those of the first segment."""
    at, l4 = p.at, p.l4 - p.at
    if p.version == 4:
        if origin[0] != buffer[at] or origin[1] != buffer[at + 1]:
            return False
        for i in range(ipv4.FRAGMENT, ipv4.CHECKSUM):
            if origin[i] != buffer[at + i]:
                return False
        first = ipv4.SOURCE
    else:
        for i in range(ipv6.PAYLOAD_LENGTH):
            if origin[i] != buffer[at + i]:
                return False
        first = ipv6.NEXT_HEADER
    for i in range(first, l4 + tcp.SEQUENCE):  # addresses and ports
        if origin[i] != buffer[at + i]:
            return False
    return p.protocol == _UDP or _same_tcp(origin, buffer, at, l4, p.header)


@njit
def _same_tcp(origin, buffer, at, l4, header):
    """Acknowledgement, data offset, window and options must not differ."""
    for i in range(l4 + tcp.ACKNOWLEDGEMENT, l4 + tcp.FLAGS):
        if origin[i] != buffer[at + i]:
            return False
    for i in range(l4 + tcp.WINDOW, l4 + tcp.CHECKSUM):
        if origin[i] != buffer[at + i]:
            return False
    for i in range(l4 + tcp.CHECKSUM + 2, header):
        if origin[i] != buffer[at + i]:
            return False
    return True


@njit
def _follows(m, buffer, p):
    """Whether the IPv4 identification follows the rule that the merge has, or sets it."""
    if p.version != 4:
        return True
    step = (ipv4.identification(buffer, p.at) - m.next_id) & 0xFFFF
    fixed = be16(buffer, p.at + ipv4.FRAGMENT) & ipv4.DONT_FRAGMENT != 0
    if step > 1 or (step == 0 and not fixed):
        return False
    if m.id_step != _UNKNOWN and m.id_step != step:
        return False
    m.id_step = step
    m.next_id = (m.next_id + step) & 0xFFFF
    return True


@njit
def join(w, buffer, p):
    """Add a segment to the open merge."""
    m = w.merge[0]
    payload = p.length - p.header
    _vector(w, m, buffer, p, payload)
    if p.protocol == _TCP and p.tcp_flags & tcp.PSH:
        w.merge_header[vnet.LENGTH + m.l4 + tcp.FLAGS] |= tcp.PSH
        m.closed = 1
    if payload < m.size:
        m.closed = 1


@njit
def _vector(w, m, buffer, p, payload):
    """Gather a segment's payload."""
    at = 2 * (m.segments + 1)
    w.merge_iov[at], w.merge_iov[at + 1] = address_of(buffer, p.at + p.header), payload
    m.segments += 1
    m.payload += payload
    m.next_sequence = (m.next_sequence + payload) & 0xFFFFFFFF


@njit
def keep_origin(w, buffer, p):
    """Remember the header of a first segment as it came, before it is rewritten."""
    copy(w.merge_origin, 0, buffer, p.at, p.header)


@njit
def begin(w, buffer, p, number):
    """Open a merge with a packet that was rewritten in place; ``number``: its flow, or -1."""
    m = w.merge[0]
    m.segments, m.version, m.protocol = 0, p.version, p.protocol
    m.l4, m.header, m.size, m.payload = p.l4 - p.at, p.header, p.length - p.header, 0
    m.closed, m.id_step, m.flow = 0, _UNKNOWN, number
    m.node_hi, m.node_lo = w.state[0].outer_hi, w.state[0].outer_lo
    if p.version == 4:
        m.next_id = ipv4.identification(buffer, p.at)
    if p.protocol == _TCP:
        m.next_sequence = be32(buffer, p.l4 + tcp.SEQUENCE)
        m.closed = 1 if p.tcp_flags & tcp.PSH else 0
    copy(w.merge_header, vnet.LENGTH, buffer, p.at, p.header)
    _vector(w, m, buffer, p, m.size)


@njit
def flush(w):
    """Write the open merge, if there is one."""
    m = w.merge[0]
    if m.segments == 0:
        return
    for i in range(vnet.LENGTH):
        w.merge_header[i] = 0
    if m.segments > 1:
        _finish_header(w.merge_header, m)
    w.merge_iov[0], w.merge_iov[1] = address_of(w.merge_header, 0), vnet.LENGTH + m.header
    _write(w, m.segments + 1, m.segments, vnet.LENGTH + m.header + m.payload)
    m.segments = 0


@njit
def _finish_header(header, m):
    """Make the first segment's header that of the super-packet, with a partial checksum for the kernel to complete."""
    ip, l4 = vnet.LENGTH, vnet.LENGTH + m.l4
    length = m.header - m.l4 + m.payload  # of the transport segment
    if m.version == 4:
        ipv4.set_length(header, ip, m.header + m.payload, m.l4)
        addresses = total(header, ip + ipv4.SOURCE, 8)
    else:
        put_be16(header, ip + ipv6.PAYLOAD_LENGTH, length)
        addresses = total(header, ip + ipv6.SOURCE, 32)
    field = tcp.CHECKSUM if m.protocol == _TCP else udp.CHECKSUM
    put_le16(header, l4 + field, fold(addresses + swap(m.protocol) + swap(length)))
    header[vnet.FLAGS] = vnet.NEEDS_CSUM
    header[vnet.GSO_TYPE] = vnet.GSO_UDP_L4
    if m.protocol == _TCP:
        header[vnet.GSO_TYPE] = vnet.GSO_TCPV4 if m.version == 4 else vnet.GSO_TCPV6
    else:
        put_be16(header, l4 + udp.LENGTH, length)
    put_le16(header, vnet.HDR_LEN, m.header)
    put_le16(header, vnet.GSO_SIZE, m.size)
    put_le16(header, vnet.CSUM_START, m.l4)
    put_le16(header, vnet.CSUM_OFFSET, field)


@njit
def write_packet(w, buffer, p):
    """Write one packet as it is, behind whatever is being merged. Its virtio header says: checksum complete."""
    flush(w)
    for i in range(vnet.LENGTH):
        w.merge_header[i] = 0
    w.merge_iov[0], w.merge_iov[1] = address_of(w.merge_header, 0), vnet.LENGTH
    w.merge_iov[2], w.merge_iov[3] = address_of(buffer, p.at), p.length
    _write(w, 2, 1, vnet.LENGTH + p.length)


@njit
def write_super(w, buffer, at, p):
    """Write a packet behind the virtio header with which it was read, made anew from what the packet is."""
    flush(w)
    if buffer[at + vnet.GSO_TYPE] != vnet.GSO_NONE:
        _derive_header(buffer, at, p)
    else:
        buffer[at + vnet.GSO_TYPE] = vnet.GSO_NONE
        put_le16(buffer, at + vnet.HDR_LEN, 0)
        put_le16(buffer, at + vnet.GSO_SIZE, 0)
    w.merge_iov[0], w.merge_iov[1] = address_of(buffer, at), vnet.LENGTH + p.length
    _write(w, 1, 1, vnet.LENGTH + p.length)


@njit
def write_bytes(w, address, length):
    """Write a packet of our own, behind whatever is being merged; ``address``: of its virtio header."""
    flush(w)
    w.merge_iov[0], w.merge_iov[1] = address, length
    _write(w, 1, 1, length)


@njit
def _derive_header(buffer, at, p):
    """The virtio header of a super-packet; one that fits a single segment is none."""
    if p.length - p.header <= le16(buffer, at + vnet.GSO_SIZE):
        buffer[at + vnet.GSO_TYPE] = vnet.GSO_NONE
        put_le16(buffer, at + vnet.GSO_SIZE, 0)
    length = p.at + p.length - p.l4
    if p.protocol == _UDP:
        put_be16(buffer, p.l4 + udp.LENGTH, length)
    addresses = words_total(p.source_hi, p.source_lo) + words_total(p.destination_hi, p.destination_lo)
    put_le16(buffer, p.field, fold(addresses + swap(p.protocol) + swap(length)))
    buffer[at + vnet.FLAGS] = vnet.NEEDS_CSUM
    put_le16(buffer, at + vnet.HDR_LEN, p.header)
    put_le16(buffer, at + vnet.CSUM_START, p.l4 - p.at)
    put_le16(buffer, at + vnet.CSUM_OFFSET, p.field - p.l4)


@njit
def _write(w, vectors, packets, length):
    interrupted = stages.enter(w, _WRITE)
    written = libc.writev(w.libc, w.state[0].tun, address_of(w.merge_iov, 0), vectors)
    stages.enter(w, interrupted)
    if written < 0:
        counters(w)[_FAILED] += packets
        return
    counters(w)[_CALLS] += 1
    counters(w)[_PACKETS] += packets
    counters(w)[_BYTES] += length

