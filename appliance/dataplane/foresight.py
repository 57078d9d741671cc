"""Cache lines that a packet will need, asked for while something else is done.

With many live flows each packet meets an index slot and a record (three cache lines) that were last touched long ago,
and waits for memory twice. So the outbound stage reads one packet ahead, and the inbound stage has a batch of them in
its slots anyway: a packet's index slot is asked for as soon as it is there, its record before the next system call.

Nothing is decided here: a glance at a plain TCP or UDP packet gives the hash of its key, and a wrong one costs a line.
Whatever is not plain (options, extension headers, fragments, ICMP) goes without, and so does what is larger than
``_SMALL``: there is time enough beside it, and its place in the read buffer is better used again while it is warm.
"""

from numba import njit

from appliance.dataplane import flow
from appliance.dataplane.classify import TCP, UDP, mapped
from appliance.dataplane.native import be16, le64
from appliance.dataplane.wire import ipv4, ipv6

_PLAIN_IPV4 = 0x45  # version, and a header without options
_PORTS = 4
_SMALL = 2_048


@njit
def outbound(w, buffer, at, size):
    """Foresee the flow of a packet from a container; gives its key's hash, or -1 if the packet is not plain."""
    hashed = _hash(w, buffer, at, size, False) if size <= _SMALL else -1
    if hashed >= 0:
        flow.foresee(w, hashed)
    return hashed


@njit
def inbound(w, buffer, at, size):
    """The same of a packet from another node."""
    hashed = _hash(w, buffer, at, size, True)
    if hashed >= 0:
        flow.foresee(w, hashed)
    return hashed


@njit
def _hash(w, buffer, at, size, is_inbound):
    """The hash of the key by which ``flow.find`` will look; -1 for what is not plain."""
    if size < ipv4.HEADER_MIN + _PORTS:
        return -1
    if buffer[at] == _PLAIN_IPV4:
        l4, protocol = at + ipv4.HEADER_MIN, int(buffer[at + ipv4.PROTOCOL])
        if be16(buffer, at + ipv4.FRAGMENT) & ipv4.FRAGMENT_BITS:
            return -1
        source_hi, source_lo = 0, mapped(buffer, at + ipv4.SOURCE)
        target_hi, target_lo = 0, mapped(buffer, at + ipv4.DESTINATION)
    elif buffer[at] >> 4 == 6 and size >= ipv6.HEADER + _PORTS:
        l4, protocol = at + ipv6.HEADER, int(buffer[at + ipv6.NEXT_HEADER])
        source_hi, source_lo = le64(buffer, at + ipv6.SOURCE), le64(buffer, at + ipv6.SOURCE + 8)
        target_hi, target_lo = le64(buffer, at + ipv6.DESTINATION), le64(buffer, at + ipv6.DESTINATION + 8)
    else:
        return -1
    if protocol != TCP and protocol != UDP:
        return -1
    sport, dport = be16(buffer, l4), be16(buffer, l4 + 2)
    if is_inbound:
        return flow.key_hash(w, target_hi, target_lo, source_hi, source_lo, dport, sport, protocol)
    return flow.key_hash(w, source_hi, source_lo, target_hi, target_lo, sport, dport, protocol)
