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
    """Append the segments of a super-packet with ``size`` bytes of payload each to the run of a socket and node."""
    payload_end = p.at + p.length
    pseudo = fold(
        words_total(p.source_hi, p.source_lo) + words_total(p.destination_hi, p.destination_lo) + swap(p.protocol)
    )
    at, number = p.at + p.header, 0
    while number == 0 or at < payload_end:
        length = min(size, payload_end - at)
        space = run.prepare(w, fd, node_hi, node_lo, port, p.header + length)
        _header(w.run_headers, space, buffer, p, number, length, at + length == payload_end, size)
        _transport_checksum(w.run_headers, space, buffer, p, at, length, pseudo)
        run.add(w, address_of(w.run_headers, space), p.header, address_of(buffer, at), length)
        at += length
        number += 1


@njit
def _header(target, space, buffer, p, number, length, last, size):
    """Write the header of one segment, but for its transport checksum."""
    copy(target, space, buffer, p.at, p.header)
    l4 = space + p.l4 - p.at
    if p.version == 4:
        put_be16(target, space + ipv4.ID, (be16(buffer, p.at + ipv4.ID) + number) & 0xFFFF)
        ipv4.set_length(target, space, p.header + length, p.l4 - p.at)
    else:
        put_be16(target, space + ipv6.PAYLOAD_LENGTH, p.header - ipv6.HEADER + length)
    if p.protocol != _TCP:
        put_be16(target, l4 + udp.LENGTH, udp.HEADER + length)
        return
    put_be32(target, l4 + tcp.SEQUENCE, (be32(buffer, p.l4 + tcp.SEQUENCE) + number * size) & 0xFFFFFFFF)
    flags = p.tcp_flags
    if not last:
        flags &= ~(tcp.FIN | tcp.PSH)
    if number > 0:
        flags &= ~tcp.CWR
    target[l4 + tcp.FLAGS] = flags


@njit
def _transport_checksum(target, space, buffer, p, at, length, pseudo):
    """Compute the checksum of one segment from its written header and its payload."""
    l4, field = space + p.l4 - p.at, space + p.field - p.at
    header = p.header - (p.l4 - p.at)
    put_le16(target, field, 0)
    value = total(target, l4, header) + total(buffer, at, length) + pseudo + swap(header + length)
    checksum = 0xFFFF - fold(value)
    if checksum == 0 and p.protocol != _TCP:
        checksum = 0xFFFF
    put_le16(target, field, checksum)


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
