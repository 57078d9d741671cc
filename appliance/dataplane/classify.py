"""What a packet is: one parse for both directions, checked so that nothing after it reads out of bounds.

``classify`` fills one ``PACKET`` record with offsets and the flow key, or gives the reason for the drop. Lengths must
be exact: trailing bytes are as malformed as missing ones, since nobody downstream would account for them.

``kind`` says how the packet is to be treated:

WHOLE     it has a transport header that tells its flow. TCP, UDP and SCTP flows are told apart by their ports,
          ICMP echo by its identifier, all other protocols by their addresses alone.
FRAGMENT  a part of a datagram, whose ports only the whole tells (``fragment``)
ERROR     an ICMP error; the flow is that of the packet that it quotes (``error``), which the ``inner`` fields
          describe
"""

import numpy as np
from numba import njit

from appliance import limits
from appliance.dataplane.native import be16, be32, le32, le64
from appliance.dataplane.wire import icmp, ipv4, ipv6, tcp, udp
from appliance.observe.counters import Drop

PACKET = np.dtype(
    [
        ("at", "i8"),  # offset of the IP header in its buffer
        ("length", "i8"),
        ("version", "i8"),
        ("kind", "i8"),
        ("l4", "i8"),  # offset of the transport header, or of a fragment's data
        ("header", "i8"),  # IP and transport headers together, bytes
        ("extended", "i8"),  # not 0: IPv6 extension headers before the transport header, bytes
        ("field", "i8"),  # offset of the transport checksum that covers the addresses; 0: none does
        ("protocol", "i8"),
        ("source_port", "i8"),
        ("destination_port", "i8"),
        ("source_hi", "i8"),
        ("source_lo", "i8"),
        ("destination_hi", "i8"),
        ("destination_lo", "i8"),
        ("tcp_flags", "i8"),
        # FRAGMENT
        ("offset", "i8"),  # of its data in the datagram, bytes
        ("more", "i8"),  # not the last one
        ("identification", "i8"),
        ("next_at", "i8"),  # IPv6: offset of the field that names the fragment header
        # WHOLE, put together from fragments
        ("piece", "i8"),  # size of the largest fragment that it came in, bytes of the IP packet; 0: it came whole
        # ERROR: the packet that it quotes
        ("inner", "i8"),  # offset of its IP header
        ("inner_l4", "i8"),
        ("inner_protocol", "i8"),
        ("inner_source_port", "i8"),
        ("inner_destination_port", "i8"),
        ("inner_source_hi", "i8"),
        ("inner_source_lo", "i8"),
        ("inner_destination_hi", "i8"),
        ("inner_destination_lo", "i8"),
    ]
)

WHOLE, FRAGMENT, ERROR = range(3)
TCP, UDP, ICMP, ICMP6, DCCP, SCTP, UDP_LITE = 6, 17, 1, 58, 33, 132, 136
ECHO_PORT = 1 << 16  # no identifier is so large
NO_PORT = 0
_OK, _MALFORMED = Drop.NONE.value, Drop.MALFORMED.value
_UNSUPPORTED = Drop.UNSUPPORTED_PROTOCOL.value
_PORTS = 4  # bytes in which TCP, UDP and SCTP have both ports
_SCTP_HEADER = 12  # RFC 9260 section 3.1; its CRC32c does not cover the addresses
_COVERED = 6  # offset of the checksum of UDP-Lite (RFC 3828) and DCCP (RFC 4340), which covers the addresses


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
    p.kind, p.piece, p.extended, p.tcp_flags = WHOLE, 0, 0, 0
    if p.version == 4:
        reason = _ipv4(buffer, at, length, p)
    elif p.version == 6:
        reason = _ipv6(buffer, at, length, p)
    else:
        reason = _MALFORMED
    if reason != _OK or p.kind == FRAGMENT:
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
    if not ipv4.is_fragment(buffer, at):
        return _OK
    bits = be16(buffer, at + ipv4.FRAGMENT)
    p.identification = be16(buffer, at + ipv4.ID)
    return _fragment(p, (bits & ipv4.OFFSET_BITS) << 3, bits & ipv4.MORE_FRAGMENTS, length - header)


@njit
def _fragment(p, offset, more, length):
    """A part of a datagram: all but the last carry multiples of 8 bytes, and none reaches beyond 65,535."""
    p.kind, p.offset, p.more = FRAGMENT, offset, more
    p.source_port, p.destination_port = NO_PORT, NO_PORT
    if length == 0 or (more and length & 7) or p.l4 - p.at + offset + length > limits.PACKET_MAX:
        return _MALFORMED
    return _OK


@njit
def _ipv6(buffer, at, length, p):
    if length < ipv6.HEADER or be16(buffer, at + ipv6.PAYLOAD_LENGTH) + ipv6.HEADER != length:
        return _MALFORMED
    p.source_lo, p.destination_lo = le64(buffer, at + ipv6.SOURCE + 8), le64(buffer, at + ipv6.DESTINATION + 8)
    p.source_hi = _not_mapped(le64(buffer, at + ipv6.SOURCE), p.source_lo)
    p.destination_hi = _not_mapped(le64(buffer, at + ipv6.DESTINATION), p.destination_lo)
    p.protocol, p.l4, p.next_at = np.int64(buffer[at + ipv6.NEXT_HEADER]), at + ipv6.HEADER, at + ipv6.NEXT_HEADER
    if _is_extension(p.protocol):
        return _extensions(buffer, at + length, p)
    return _OK


@njit
def _is_extension(number):
    return (
        number == ipv6.HOP_BY_HOP
        or number == ipv6.ROUTING
        or number == ipv6.FRAGMENT_HEADER
        or number == ipv6.DESTINATION_OPTIONS
    )


@njit
def _extensions(buffer, end, p):
    """Walk the chain of extension headers (RFC 8200 section 4) up to ``end``, ``limits.EXTENSIONS_MAX`` of them.

    A routing header that has not arrived is refused: the destination that we judge would not be the last.
    """
    for number in range(limits.EXTENSIONS_MAX):
        if p.l4 + ipv6.EXTENSION_UNIT > end or (p.protocol == ipv6.HOP_BY_HOP and number > 0):
            return _MALFORMED
        if p.protocol == ipv6.FRAGMENT_HEADER:
            bits = be16(buffer, p.l4 + ipv6.FRAGMENT_OFFSET)
            size = np.int64(ipv6.FRAGMENT_LENGTH)
        else:
            bits, size = 0, (np.int64(buffer[p.l4 + 1]) + 1) * ipv6.EXTENSION_UNIT
        if p.protocol == ipv6.ROUTING and buffer[p.l4 + ipv6.SEGMENTS_LEFT] != 0:
            return _UNSUPPORTED
        if p.l4 + size > end:
            return _MALFORMED
        fragment = p.l4
        p.protocol, p.l4 = np.int64(buffer[p.l4]), p.l4 + size
        if bits & (ipv6.OFFSET_BITS | ipv6.MORE_BIT):
            p.identification = be32(buffer, fragment + ipv6.FRAGMENT_ID)
            return _fragment(p, bits & ipv6.OFFSET_BITS, bits & ipv6.MORE_BIT, end - p.l4)
        if not _is_extension(p.protocol):
            p.extended = p.l4 - p.at - ipv6.HEADER
            return _OK
        p.next_at = fragment
    return _MALFORMED


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
    if p.protocol == ICMP or p.protocol == ICMP6:
        return _icmp(buffer, length, p)
    return _other(buffer, length, p)


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
    p.header, p.field = p.l4 - p.at + udp.HEADER, p.l4 + udp.CHECKSUM
    return _OK


@njit
def _other(buffer, length, p):
    """Any other protocol: told apart by its addresses, and SCTP by its ports too, as the kernel's steering does."""
    p.source_port, p.destination_port, p.field = NO_PORT, NO_PORT, 0
    p.header = p.l4 - p.at
    if p.protocol == SCTP:
        if length < _SCTP_HEADER:
            return _MALFORMED
        _ports(buffer, p)
        p.header += _SCTP_HEADER
    elif p.protocol == UDP_LITE or p.protocol == DCCP:
        if length < _COVERED + 2:
            return _MALFORMED
        p.field = p.l4 + _COVERED
    return _OK


@njit
def _icmp(buffer, length, p):
    if (p.protocol == ICMP) != (p.version == 4):
        return _UNSUPPORTED
    if length < icmp.HEADER:
        return _MALFORMED
    kind = buffer[p.l4 + icmp.TYPE]
    p.header = p.l4 - p.at + icmp.HEADER
    p.field = 0 if p.version == 4 else p.l4 + icmp.CHECKSUM  # only ICMPv6 covers the addresses (RFC 4443 2.3)
    if p.version == 4:
        is_error = kind == icmp.UNREACHABLE or kind == icmp.TIME_EXCEEDED or kind == icmp.PARAMETER_PROBLEM
    else:
        is_error = icmp.UNREACHABLE6 <= kind <= icmp.PARAMETER_PROBLEM6
    if is_error:
        return _error(buffer, length, p)
    code = buffer[p.l4 + icmp.CODE]
    p.source_port, p.destination_port = _echo_ports(buffer, p.l4, p.version)
    return _OK if code == 0 and p.source_port >= 0 else _UNSUPPORTED


@njit
def _echo_ports(buffer, at, version):
    """An echo message's identifier stands for the client's port, ``ECHO_PORT`` for the server's: so a reply mirrors its
    request. -1, -1 for any other message."""
    kind, identifier = np.int64(buffer[at + icmp.TYPE]), be16(buffer, at + icmp.IDENTIFIER)
    request, reply = icmp.ECHO_REQUEST, icmp.ECHO_REPLY
    if version == 6:
        request, reply = icmp.ECHO_REQUEST6, icmp.ECHO_REPLY6
    if kind == request:
        return identifier, np.int64(ECHO_PORT)
    if kind == reply:
        return np.int64(ECHO_PORT), identifier
    return np.int64(-1), np.int64(-1)


@njit
def _error(buffer, length, p):
    """An ICMP error: what it quotes must be the head of a packet, to the first 8 bytes of its transport header."""
    p.kind, p.inner = ERROR, p.l4 + icmp.HEADER
    p.source_port, p.destination_port = NO_PORT, NO_PORT
    at, room = p.inner, length - icmp.HEADER
    if p.version == 4:
        if room < ipv4.HEADER_MIN or buffer[at] >> 4 != 4:
            return _MALFORMED
        header = np.int64(ipv4.header_length(buffer, at))
        if header < ipv4.HEADER_MIN or be16(buffer, at + ipv4.FRAGMENT) & ipv4.OFFSET_BITS:
            return _MALFORMED
        p.inner_source_hi, p.inner_source_lo = 0, mapped(buffer, at + ipv4.SOURCE)
        p.inner_destination_hi, p.inner_destination_lo = 0, mapped(buffer, at + ipv4.DESTINATION)
        p.inner_protocol = buffer[at + ipv4.PROTOCOL]
    else:
        if room < ipv6.HEADER or buffer[at] >> 4 != 6:
            return _MALFORMED
        header = np.int64(ipv6.HEADER)
        p.inner_source_lo = le64(buffer, at + ipv6.SOURCE + 8)
        p.inner_destination_lo = le64(buffer, at + ipv6.DESTINATION + 8)
        p.inner_source_hi = _not_mapped(le64(buffer, at + ipv6.SOURCE), p.inner_source_lo)
        p.inner_destination_hi = _not_mapped(le64(buffer, at + ipv6.DESTINATION), p.inner_destination_lo)
        p.inner_protocol = buffer[at + ipv6.NEXT_HEADER]
    p.inner_l4 = at + header
    if room < header + 8:
        return _MALFORMED
    return _inner_ports(buffer, p)


@njit
def _inner_ports(buffer, p):
    protocol = p.inner_protocol
    p.inner_source_port, p.inner_destination_port = np.int64(NO_PORT), np.int64(NO_PORT)
    if protocol == TCP or protocol == UDP or protocol == SCTP:
        p.inner_source_port, p.inner_destination_port = be16(buffer, p.inner_l4), be16(buffer, p.inner_l4 + 2)
    elif protocol == ICMP or protocol == ICMP6:
        p.inner_source_port, p.inner_destination_port = _echo_ports(buffer, p.inner_l4, p.version)
        if p.inner_source_port < 0:
            return _MALFORMED  # an error about an error (RFC 1122 3.2.2), or about what we never carried
    return _OK
