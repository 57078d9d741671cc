"""ICMP errors from containers and nodes about packets of the overlay (RFC 5508 sections 4 and 7).

An error quotes the packet that it is about as its sender saw it. On its way back it must come to quote the packet as
the other end sent it, or that end's kernel would not know the connection. On the wire the quoted packet has the
addresses that it had on the wire; each node translates between that and its own side.

    a called S, b got [instA → nsB] and says "port unreachable"      quoted by b:         instA → nsB
    on the wire from B to A, [instB → nsA]                           quoted on the wire:  instA → nsB
    a gets it from S                                                 quoted to a:         nsA → S

A node may speak for itself, as a router does ("time exceeded"): its source then stays as it is. An error is passed on
only if its own checksum is right, since its content is changed and the checksum made anew. Towards a container it must
be about a live flow of that container; anything else could be forged to cut other people's connections. An error is no
packet of the flow: it lengthens no flow's life, and does not find one whose time is over or whose instance is gone.
"""

import numpy as np
from numba import njit

from appliance.dataplane import flow
from appliance.dataplane.classify import DCCP, TCP, UDP, UDP_LITE
from appliance.dataplane.decide import is_current, is_local, peer_of
from appliance.dataplane.memory import counters
from appliance.dataplane.native import le16, put_le16
from appliance.dataplane.reply import gateway
from appliance.dataplane.rewrite import put_address
from appliance.dataplane.wire import icmp, ipv4, ipv6, tcp, udp
from appliance.dataplane.wire.checksum import adjust, delta, fold, swap, total, words_total
from appliance.observe.counters import COUNTS, Count, Drop
from appliance.tables.read import find_host, hosts

_OK, _MALFORMED = Drop.NONE.value, Drop.MALFORMED.value
_SPOOFED, _NO_FLOW = Drop.SPOOFED_SOURCE.value, Drop.ICMP_NO_FLOW.value
_TRANSLATED = COUNTS + Count.TRANSLATED_ERRORS.value
_ICMP, _ICMP6 = 1, 58


@njit
def is_valid(buffer, p):
    """Whether the error's own checksum is right."""
    return fold(_sum(buffer, p)) == 0xFFFF


@njit
def _sum(buffer, p):
    length = p.at + p.length - p.l4
    value = total(buffer, p.l4, length)
    if p.version == 6:
        value += words_total(p.source_hi, p.source_lo) + words_total(p.destination_hi, p.destination_lo)
        value += swap(np.int64(p.protocol)) + swap(np.int64(length))
    return value


@njit
def seal(buffer, p):
    """Compute the error's checksum anew."""
    put_le16(buffer, p.l4 + icmp.CHECKSUM, 0)
    put_le16(buffer, p.l4 + icmp.CHECKSUM, 0xFFFF - fold(_sum(buffer, p)))


@njit
def check_outbound(w, buffer, p):
    """Whether an error from this node's side may be: it is whole, and comes from whom the quoted packet was for, or
    from the node itself. Gives a ``Drop`` reason, 0 if it may."""
    if not is_valid(buffer, p):
        return _MALFORMED
    gateway_hi, gateway_lo = gateway(w, p.version)
    from_gateway = p.source_lo == gateway_lo and p.source_hi == gateway_hi and gateway_lo != 0
    about_sender = p.inner_destination_lo == p.source_lo and p.inner_destination_hi == p.source_hi
    if not from_gateway and not about_sender:
        return _NO_FLOW if is_local(w, p.source_hi, p.source_lo) else _SPOOFED
    return _OK if is_local(w, p.inner_destination_hi, p.inner_destination_lo) else _SPOOFED


@njit
def find_outbound(w, p):
    """Number of the local container's flow that the error is about, or -1: the quoted packet came in on it."""
    number = flow.find(
        w,
        flow.OUTBOUND,
        p.inner_destination_hi,
        p.inner_destination_lo,
        p.inner_source_hi,
        p.inner_source_lo,
        p.inner_destination_port,
        p.inner_source_port,
        np.int64(p.inner_protocol),
    )
    if number < 0 or flow.records(w)[number].deadline <= w.state[0].now or not is_current(w, number):
        return np.int64(-1)
    return number


@njit
def find_inbound(w, p, local_hi, local_lo):
    """Number of the flow of a local container that the error is about, or -1: the quoted packet went out on it."""
    number = _sent_to(w, p, local_hi, local_lo, p.inner_destination_hi, p.inner_destination_lo)
    if number >= 0:
        return number
    target = find_host(w, p.inner_destination_hi, p.inner_destination_lo)
    if target < 0:
        return np.int64(-1)
    peer_hi, peer_lo = peer_of(hosts(w)[target])
    return _sent_to(w, p, local_hi, local_lo, peer_hi, peer_lo)


@njit
def _sent_to(w, p, local_hi, local_lo, peer_hi, peer_lo):
    number = flow.find(
        w,
        flow.INBOUND,
        local_hi,
        local_lo,
        peer_hi,
        peer_lo,
        p.inner_source_port,
        p.inner_destination_port,
        np.int64(p.inner_protocol),
    )
    if number < 0:
        return number
    f = flow.records(w)[number]
    if f.deadline <= w.state[0].now:
        return np.int64(-1)
    if f.target_lo != p.inner_destination_lo or f.target_hi != p.inner_destination_hi:
        return np.int64(-1)
    if f.source_lo != p.inner_source_lo or f.source_hi != p.inner_source_hi:
        return np.int64(-1)
    return number


@njit
def quote(w, buffer, p, source_hi, source_lo, destination_hi, destination_lo):
    """Give the quoted packet other addresses, with what follows for its checksums."""
    change = fold(
        delta(p.inner_source_hi, p.inner_source_lo, source_hi, source_lo)
        + delta(p.inner_destination_hi, p.inner_destination_lo, destination_hi, destination_lo)
    )
    first, second = (ipv4.SOURCE, ipv4.DESTINATION) if p.version == 4 else (ipv6.SOURCE, ipv6.DESTINATION)
    put_address(buffer, p.version, p.inner + first, source_hi, source_lo)
    put_address(buffer, p.version, p.inner + second, destination_hi, destination_lo)
    p.inner_source_hi, p.inner_source_lo = source_hi, source_lo
    p.inner_destination_hi, p.inner_destination_lo = destination_hi, destination_lo
    counters(w)[_TRANSLATED] += 1
    if change == 0:
        return
    if p.version == 4:
        adjust(buffer, p.inner + ipv4.CHECKSUM, change)
    field = _quoted_field(p)
    if field == 0 or field + 2 > p.at + p.length:
        return
    distinct = p.inner_protocol == UDP or p.inner_protocol == UDP_LITE
    if distinct and le16(buffer, field) == 0:
        return
    adjust(buffer, field, change)
    if distinct and le16(buffer, field) == 0:
        put_le16(buffer, field, 0xFFFF)


@njit
def _quoted_field(p):
    """Where the quoted packet has a checksum that covers its addresses; 0: nowhere."""
    if p.inner_protocol == TCP:
        return p.inner_l4 + tcp.CHECKSUM
    if p.inner_protocol == UDP or p.inner_protocol == UDP_LITE or p.inner_protocol == DCCP:
        return p.inner_l4 + udp.CHECKSUM  # at the same place in all three
    return p.inner_l4 + icmp.CHECKSUM if p.inner_protocol == _ICMP6 else np.int64(0)


@njit
def readdress(buffer, p, source_hi, source_lo, destination_hi, destination_lo):
    """Give the error itself other addresses and right checksums."""
    first, second = (ipv4.SOURCE, ipv4.DESTINATION) if p.version == 4 else (ipv6.SOURCE, ipv6.DESTINATION)
    change = fold(
        delta(p.source_hi, p.source_lo, source_hi, source_lo)
        + delta(p.destination_hi, p.destination_lo, destination_hi, destination_lo)
    )
    put_address(buffer, p.version, p.at + first, source_hi, source_lo)
    put_address(buffer, p.version, p.at + second, destination_hi, destination_lo)
    if p.version == 4 and change != 0:
        adjust(buffer, p.at + ipv4.CHECKSUM, change)
    p.source_hi, p.source_lo, p.destination_hi, p.destination_lo = source_hi, source_lo, destination_hi, destination_lo
    seal(buffer, p)
