"""Cutting a super-packet into packets: what the kernel's tcp_gso_segment and __udp_gso_segment would do.

Only headers are written; the payload stays where the TUN read put it and is gathered by the run. Per segment change
(RFC 9293, RFC 768): IPv4 total length, identification and checksum, or IPv6 payload length; TCP sequence, FIN and PSH
(last only), CWR (first only), checksum; UDP length and checksum.
"""

import numpy as np
from numba import njit

from appliance.dataplane import run
from appliance.dataplane.native import address_of, be16, be32, copy, le16, put_be16, put_be32, put_le16
from appliance.dataplane.wire import ipv4, ipv6, tcp, udp
from appliance.dataplane.wire.checksum import fold, swap, total, words_total

_TCP = 6


@njit
def cut(w, buffer, p, size, fd, node_hi, node_lo, port):
    """Append the segments of a super-packet with ``size`` bytes of payload each to the run of a socket and node.

    What all segments' headers have in common is summed once; a header that was just written is not read again, as loads
    that span fresh stores have to wait for them.
    """
    payload_end, l4, is_tcp = p.at + p.length, p.l4 - p.at, p.protocol == _TCP
    header, at, number = np.int64(p.header), p.at + p.header, 0
    network = _network_total(buffer, p)
    transport = _transport_total(buffer, p, l4)
    sequence = be32(buffer, p.l4 + tcp.SEQUENCE) if is_tcp else 0
    while number == 0 or at < payload_end:
        length = min(size, payload_end - at)
        space = run.prepare(w, fd, node_hi, node_lo, port, header + length)
        target = w.run_headers
        copy(target, space, buffer, p.at, header)
        if p.version == 4:
            _network(target, space, network, header + length, (be16(buffer, p.at + ipv4.ID) + number) & 0xFFFF)
        else:
            put_be16(target, space + ipv6.PAYLOAD_LENGTH, header - ipv6.HEADER + length)
        value = transport + total(buffer, at, length) + swap(header - l4 + length)
        if is_tcp:
            flags = _flags(p, number, at + length == payload_end)
            value += _tcp(target, space + l4, buffer[p.l4 + tcp.DATA_OFFSET], sequence, flags)
            sequence = (sequence + size) & 0xFFFFFFFF
        else:
            put_be16(target, space + l4 + udp.LENGTH, udp.HEADER + length)
            value += swap(udp.HEADER + length)
        checksum = 0xFFFF - fold(value)
        if checksum == 0 and not is_tcp:
            checksum = 0xFFFF
        put_le16(target, space + p.field - p.at, checksum)
        run.add(w, address_of(target, space), header, address_of(buffer, at), length)
        at += length
        number += 1


@njit
def _network_total(buffer, p):
    """Sum of an IPv4 header without what differs from segment to segment: length, identification, checksum."""
    if p.version != 4:
        return np.int64(0)
    value = total(buffer, p.at, p.l4 - p.at)
    for field in (ipv4.TOTAL_LENGTH, ipv4.ID, ipv4.CHECKSUM):
        value += 0xFFFF - le16(buffer, p.at + field)
    return value


@njit
def _transport_total(buffer, p, l4):
    """Sum of pseudo-header and transport header without what differs: lengths, checksum, sequence, flags."""
    value = words_total(p.source_hi, p.source_lo) + words_total(p.destination_hi, p.destination_lo) + swap(p.protocol)
    value += total(buffer, p.l4, p.header - l4) + 0xFFFF - le16(buffer, p.field)
    if p.protocol != _TCP:
        return value + 0xFFFF - le16(buffer, p.l4 + udp.LENGTH)
    for field in (tcp.SEQUENCE, tcp.SEQUENCE + 2, tcp.DATA_OFFSET):
        value += 0xFFFF - le16(buffer, p.l4 + field)
    return value


@njit
def _network(target, space, network, length, identification):
    put_be16(target, space + ipv4.TOTAL_LENGTH, length)
    put_be16(target, space + ipv4.ID, identification)
    put_le16(target, space + ipv4.CHECKSUM, 0xFFFF - fold(network + swap(length) + swap(identification)))


@njit
def _flags(p, number, last):
    """FIN and PSH stand on the last segment only, CWR on the first."""
    flags = p.tcp_flags
    if not last:
        flags &= ~(tcp.FIN | tcp.PSH)
    if number > 0:
        flags &= ~tcp.CWR
    return flags


@njit
def _tcp(target, l4, offset, sequence, flags):
    """Write what differs in a TCP header; gives its sum."""
    put_be32(target, l4 + tcp.SEQUENCE, sequence)
    target[l4 + tcp.FLAGS] = flags
    return swap(sequence >> 16) + swap(sequence & 0xFFFF) + np.int64(offset) + (np.int64(flags) << 8)


@njit
def finish(buffer, p, start, offset):
    """Complete a partial checksum (VIRTIO_NET_HDR_F_NEEDS_CSUM): the field holds the sum of what precedes ``start``.

    ``start`` counts from the IP header, ``offset`` from there; both were checked against the packet's length.
    """
    field = p.at + start + offset
    checksum = 0xFFFF - total(buffer, p.at + start, p.length - start)
    if checksum == 0 and p.protocol != _TCP:
        checksum = 0xFFFF
    put_le16(buffer, field, checksum)


@njit
def is_valid(buffer, p):
    """Whether the TCP or UDP checksum of a packet is right. A UDP checksum of zero is not: nothing was verified."""
    if p.protocol != _TCP and le16(buffer, p.field) == 0:
        return False
    length = p.at + p.length - p.l4
    value = (
        words_total(p.source_hi, p.source_lo)
        + words_total(p.destination_hi, p.destination_lo)
        + swap(p.protocol)
        + swap(np.int64(length))
        + total(buffer, p.l4, length)
    )
    return fold(value) == 0xFFFF
