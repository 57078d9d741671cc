"""What the appliance itself says to a container: ICMP errors and TCP resets.

A packet that cannot go on is never met with silence: TCP gets a reset from the address that it dialled, everything else
an ICMP error from this node's own address in the overlay (``layout.H_GATEWAY4``), as a router would send it. Nothing is
said about ICMP errors, resets, packets to a group, or fragments other than the first (RFC 1122 3.2.2, RFC 4443 2.4(e));
about an echo reply only that it is too big.

What a source can make us say is limited: a token bucket for each of ``limits.REPLY_SOURCES`` hashes of the source.
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane import merge
from appliance.dataplane.classify import ECHO_PORT, ERROR, ICMP, ICMP6, TCP
from appliance.dataplane.memory import counters
from appliance.dataplane.native import (
    address_of,
    be32,
    copy,
    put_be16,
    put_be32,
    put_le16,
    put_le32,
    put_le64,
)
from appliance.dataplane.wire import icmp, ipv4, ipv6, tcp, vnet
from appliance.dataplane.wire.checksum import fold, swap, total, words_total
from appliance.observe.counters import COUNTS, Count
from appliance.tables.layout import H_GATEWAY4, H_GATEWAY6_HI, H_GATEWAY6_LO
from appliance.tables.read import header, mix

_REPLIES, _LIMITED = COUNTS + Count.REPLIES.value, COUNTS + Count.REPLIES_LIMITED.value
_HOPS = 64
_IP = vnet.LENGTH  # where the packet begins in ``reply``


@njit
def unreachable(w, buffer, p, segments_payload):
    """Say that a packet's destination has nobody. ``segments_payload``: bytes of transport payload, of all segments."""
    is_echo_reply = (p.protocol == ICMP or p.protocol == ICMP6) and p.source_port == ECHO_PORT
    if is_echo_reply or not _may_answer(w, p):
        return
    if p.protocol == TCP:
        _reset(w, buffer, p, segments_payload)
    elif p.version == 4:
        _icmp(w, buffer, p, icmp.UNREACHABLE, icmp.HOST_UNREACHABLE, 0)
    else:
        _icmp(w, buffer, p, icmp.UNREACHABLE6, icmp.ADDRESS_UNREACHABLE6, 0)


@njit
def too_big(w, buffer, p, mtu):
    """Say that a packet is larger than the path takes: RFC 1191 section 4, RFC 4443 section 3.2."""
    if not _may_answer(w, p):
        return
    if p.version == 4:
        _icmp(w, buffer, p, icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED, mtu)
    else:
        _icmp(w, buffer, p, icmp.TOO_BIG6, 0, max(mtu, limits.IPV6_MTU_MIN))


@njit
def _may_answer(w, p):
    if p.kind == ERROR or (p.protocol == TCP and p.tcp_flags & tcp.RST) or _is_group(p):
        return False
    if _has_token(w, p.source_hi, p.source_lo):
        counters(w)[_REPLIES] += 1
        return True
    counters(w)[_LIMITED] += 1
    return False


@njit
def _is_group(p):
    """Whether a packet was sent to more than one, or to nobody: multicast, class E and broadcast, and mapped addresses
    (``classify`` gives them a high word of ones)."""
    if p.version == 4:
        return (p.destination_lo >> 32) & 0xFF >= 224
    return p.destination_hi & 0xFF == 0xFF


@njit
def _has_token(w, hi, lo):
    """Take a token of a source's bucket. A bucket is one word: when it will be full again (GCRA, ITU-T I.371)."""
    number = mix(hi, lo, w.flow_seed) & (limits.REPLY_SOURCES - 1)
    now = w.state[0].now
    full_at = max(np.int64(w.buckets[number]), now)
    if full_at - now > (limits.REPLY_BURST - 1) * limits.REPLY_INTERVAL:
        return False
    w.buckets[number] = full_at + limits.REPLY_INTERVAL
    return True


@njit
def _ip(w, p, source_hi, source_lo, protocol, length):
    """An IP header towards the source of ``p``, for ``length`` bytes behind it; gives the pseudo-header's sum."""
    reply = w.reply
    for i in range(vnet.LENGTH + ipv6.HEADER):
        reply[i] = 0
    if p.version == 4:
        reply[_IP] = 0x45
        reply[_IP + ipv4.TTL], reply[_IP + ipv4.PROTOCOL] = _HOPS, protocol
        put_le32(reply, _IP + ipv4.SOURCE, (source_lo >> 32) & 0xFFFFFFFF)
        put_le32(reply, _IP + ipv4.DESTINATION, (p.source_lo >> 32) & 0xFFFFFFFF)
        ipv4.set_length(reply, _IP, ipv4.HEADER_MIN + length, ipv4.HEADER_MIN)
    else:
        reply[_IP] = 0x60
        reply[_IP + ipv6.NEXT_HEADER], reply[_IP + ipv6.HOP_LIMIT] = protocol, _HOPS
        put_be16(reply, _IP + ipv6.PAYLOAD_LENGTH, length)
        put_le64(reply, _IP + ipv6.SOURCE, source_hi)
        put_le64(reply, _IP + ipv6.SOURCE + 8, source_lo)
        put_le64(reply, _IP + ipv6.DESTINATION, p.source_hi)
        put_le64(reply, _IP + ipv6.DESTINATION + 8, p.source_lo)
    sums = words_total(source_hi, source_lo) + words_total(p.source_hi, p.source_lo)
    return sums + swap(np.int64(protocol)) + swap(np.int64(length))


@njit
def _header_length(p):
    return ipv4.HEADER_MIN if p.version == 4 else ipv6.HEADER


@njit
def _reset(w, buffer, p, payload):
    """RFC 9293 section 3.10.7.1: what a closed port answers."""
    reply, l4 = w.reply, _IP + _header_length(p)
    pseudo = _ip(w, p, p.destination_hi, p.destination_lo, TCP, tcp.HEADER_MIN)
    for i in range(tcp.HEADER_MIN):
        reply[l4 + i] = 0
    put_be16(reply, l4, p.destination_port)
    put_be16(reply, l4 + 2, p.source_port)
    reply[l4 + tcp.DATA_OFFSET] = (tcp.HEADER_MIN >> 2) << 4
    if p.tcp_flags & tcp.ACK:
        put_be32(reply, l4 + tcp.SEQUENCE, be32(buffer, p.l4 + tcp.ACKNOWLEDGEMENT))
        reply[l4 + tcp.FLAGS] = tcp.RST
    else:
        length = payload + (p.tcp_flags & tcp.SYN != 0) + (p.tcp_flags & tcp.FIN != 0)
        acknowledged = (be32(buffer, p.l4 + tcp.SEQUENCE) + length) & 0xFFFFFFFF
        put_be32(reply, l4 + tcp.ACKNOWLEDGEMENT, acknowledged)
        reply[l4 + tcp.FLAGS] = tcp.RST | tcp.ACK
    put_le16(reply, l4 + tcp.CHECKSUM, 0xFFFF - fold(total(reply, l4, tcp.HEADER_MIN) + pseudo))
    _write(w, l4 + tcp.HEADER_MIN)


@njit
def _icmp(w, buffer, p, kind, code, mtu):
    """An ICMP error from this node that quotes the packet, as far as it may."""
    reply, l4 = w.reply, _IP + _header_length(p)
    quote = min(p.length, limits.REPLY_QUOTE_V4 if p.version == 4 else limits.REPLY_QUOTE_V6)
    protocol = ICMP if p.version == 4 else ICMP6
    source_hi, source_lo = gateway(w, p.version)
    if source_lo == 0 and source_hi == 0:  # a node that has no address in the overlay yet
        source_hi, source_lo = p.destination_hi, p.destination_lo
    pseudo = _ip(w, p, source_hi, source_lo, protocol, icmp.HEADER + quote)
    for i in range(icmp.HEADER):
        reply[l4 + i] = 0
    reply[l4 + icmp.TYPE], reply[l4 + icmp.CODE] = kind, code
    if p.version == 4:
        put_be16(reply, l4 + icmp.MTU4, mtu)
        pseudo = 0
    else:
        put_be32(reply, l4 + icmp.MTU6, mtu)
    copy(reply, l4 + icmp.HEADER, buffer, p.at, quote)
    put_le16(reply, l4 + icmp.CHECKSUM, 0xFFFF - fold(total(reply, l4, icmp.HEADER + quote) + pseudo))
    _write(w, l4 + icmp.HEADER + quote)


@njit
def gateway(w, version):
    """The node's own address inside the overlay."""
    words = header(w)
    if version == 4:
        return np.int64(0), words[H_GATEWAY4]
    return words[H_GATEWAY6_HI], words[H_GATEWAY6_LO]


@njit
def _write(w, length):
    merge.write_bytes(w, address_of(w.reply, 0), length)
