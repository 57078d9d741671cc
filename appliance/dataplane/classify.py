"""What a packet is: one parse for both directions, checked so that nothing after it reads out of bounds.

``classify`` fills one ``PACKET`` record with offsets and the flow key, or gives the reason for the drop. Lengths must
be exact: trailing bytes are as malformed as missing ones, since nobody downstream would account for them.
"""

import numpy as np
from numba import njit

from appliance.dataplane.native import be16, le32, le64
from appliance.dataplane.wire import icmp, ipv4, ipv6, tcp, udp
from appliance.observe.counters import Drop

PACKET = np.dtype(
    [
        ("at", "i8"),  # offset of the IP header in its buffer
        ("length", "i8"),
        ("version", "i8"),
        ("l4", "i8"),  # offset of the transport header
        ("header", "i8"),  # IP and transport headers together, bytes
        ("field", "i8"),  # offset of the transport checksum that covers the addresses; 0: none does
        ("protocol", "i8"),
        ("source_port", "i8"),
        ("destination_port", "i8"),
        ("source_hi", "i8"),
        ("source_lo", "i8"),
        ("destination_hi", "i8"),
        ("destination_lo", "i8"),
        ("tcp_flags", "i8"),
    ]
)

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
ECHO_PORT = 1 << 16  # no identifier is so large
_OK, _MALFORMED = Drop.NONE.value, Drop.MALFORMED.value
_FRAGMENT, _UNSUPPORTED = Drop.FRAGMENT.value, Drop.UNSUPPORTED_PROTOCOL.value


@njit
def mapped(buffer, at):
    """The low word of the IPv4-mapped form of the address at an offset; the high word is 0."""
    return (le32(buffer, at) << 32) | 0xFFFF0000


@njit
def classify(buffer, at, length, p, is_super):
    """Parse the packet at an offset into the record ``p``; gives a ``Drop`` reason, 0 if it is good.

    ``is_super``: a USO super-packet, whose UDP length says nothing.
    """
    if length < ipv4.HEADER_MIN:
        return _MALFORMED
    p.at, p.length, p.version = at, length, buffer[at] >> 4
    if p.version == 4:
        reason = _ipv4(buffer, at, length, p)
    elif p.version == 6:
        reason = _ipv6(buffer, at, length, p)
    else:
        reason = _MALFORMED
    if reason != _OK:
        return reason
    return _transport(buffer, at + length - p.l4, p, is_super)


@njit
def _ipv4(buffer, at, length, p):
    header = np.int64(ipv4.header_length(buffer, at))
    if header < ipv4.HEADER_MIN or header > length or be16(buffer, at + ipv4.TOTAL_LENGTH) != length:
        return _MALFORMED
    p.source_hi, p.source_lo = 0, mapped(buffer, at + ipv4.SOURCE)
    p.destination_hi, p.destination_lo = 0, mapped(buffer, at + ipv4.DESTINATION)
    p.protocol, p.l4 = buffer[at + ipv4.PROTOCOL], at + header
    return _FRAGMENT if ipv4.is_fragment(buffer, at) else _OK


@njit
def _ipv6(buffer, at, length, p):
    if length < ipv6.HEADER or be16(buffer, at + ipv6.PAYLOAD_LENGTH) + ipv6.HEADER != length:
        return _MALFORMED
    p.source_lo, p.destination_lo = le64(buffer, at + ipv6.SOURCE + 8), le64(buffer, at + ipv6.DESTINATION + 8)
    p.source_hi = _not_mapped(le64(buffer, at + ipv6.SOURCE), p.source_lo)
    p.destination_hi = _not_mapped(le64(buffer, at + ipv6.DESTINATION), p.destination_lo)
    p.protocol, p.l4 = buffer[at + ipv6.NEXT_HEADER], at + ipv6.HEADER
    return _FRAGMENT if p.protocol == ipv6.FRAGMENT_HEADER else _OK


@njit
def _not_mapped(hi, lo):
    """The high word of an address in an IPv6 header; all ones, which no table has, if the address is IPv4-mapped.

    Such an address is IPv4 in our tables, and must not be met by an IPv6 packet (RFC 4291 gives it no use on the wire).
    All ones add nothing to a one's complement sum, so checksums come out right all the same.
    """
    return np.int64(-1) if hi == 0 and (lo & 0xFFFFFFFF) == 0xFFFF0000 else hi


@njit
def _transport(buffer, length, p, is_super):
    """Parse ``length`` bytes of transport header and payload."""
    if p.protocol == TCP:
        return _tcp(buffer, length, p)
    if p.protocol == UDP:
        return _udp(buffer, length, p, is_super)
    if (p.protocol == ICMP and p.version == 4) or (p.protocol == ICMP6 and p.version == 6):
        return _echo(buffer, length, p)
    return _UNSUPPORTED


@njit
def _ports(buffer, p):
    p.source_port, p.destination_port = be16(buffer, p.l4), be16(buffer, p.l4 + 2)


@njit
def _tcp(buffer, length, p):
    if length < tcp.HEADER_MIN:
        return _MALFORMED
    header = np.int64(tcp.header_length(buffer, p.l4))
    if header < tcp.HEADER_MIN or header > length:
        return _MALFORMED
    _ports(buffer, p)
    p.tcp_flags = buffer[p.l4 + tcp.FLAGS]
    p.header, p.field = p.l4 - p.at + header, p.l4 + tcp.CHECKSUM
    return _OK


@njit
def _udp(buffer, length, p, is_super):
    if length < udp.HEADER or (not is_super and be16(buffer, p.l4 + udp.LENGTH) != length):
        return _MALFORMED
    _ports(buffer, p)
    p.tcp_flags = 0
    p.header, p.field = p.l4 - p.at + udp.HEADER, p.l4 + udp.CHECKSUM
    return _OK


@njit
def _echo(buffer, length, p):
    """The identifier stands for the client's port, ``ECHO_PORT`` for the server's: so a reply mirrors its request."""
    if length < icmp.HEADER:
        return _MALFORMED
    kind, code = buffer[p.l4 + icmp.TYPE], buffer[p.l4 + icmp.CODE]
    request, reply = icmp.ECHO_REQUEST, icmp.ECHO_REPLY
    if p.version == 6:
        request, reply = icmp.ECHO_REQUEST6, icmp.ECHO_REPLY6
    if code != 0 or (kind != request and kind != reply):
        return _UNSUPPORTED
    identifier = be16(buffer, p.l4 + icmp.IDENTIFIER)
    p.source_port, p.destination_port = (identifier, ECHO_PORT) if kind == request else (ECHO_PORT, identifier)
    p.tcp_flags = 0
    p.header = p.l4 - p.at + icmp.HEADER
    p.field = 0 if p.version == 4 else p.l4 + icmp.CHECKSUM  # only ICMPv6 covers the addresses (RFC 4443 2.3)
    return _OK
