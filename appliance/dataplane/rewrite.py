"""Replacing addresses in a packet, and what follows for its checksums.

Checksums are updated incrementally (RFC 1624), so a wrong one stays wrong: a corrupted packet is never laundered into a
good one.
"""

from numba import njit

from appliance.dataplane.native import le16, put_le16, put_le32, put_le64
from appliance.dataplane.wire import ipv4, ipv6
from appliance.dataplane.wire.checksum import adjust, adjust_partial, delta

_V4 = 4
_UDP, _UDP_LITE = 17, 136  # an all-zero checksum means something else in both (RFC 768, RFC 3828 section 3.1)


@njit
def put_address(buffer, version, at, hi, lo):
    """Write the two words of an address into a packet of its family."""
    if version == _V4:
        put_le32(buffer, at, (lo >> 32) & 0xFFFFFFFF)
    else:
        put_le64(buffer, at, hi)
        put_le64(buffer, at + 8, lo)


@njit
def _put_source(buffer, p, hi, lo):
    put_address(buffer, p.version, p.at + (ipv4.SOURCE if p.version == _V4 else ipv6.SOURCE), hi, lo)
    p.source_hi, p.source_lo = hi, lo


@njit
def _put_destination(buffer, p, hi, lo):
    put_address(buffer, p.version, p.at + (ipv4.DESTINATION if p.version == _V4 else ipv6.DESTINATION), hi, lo)
    p.destination_hi, p.destination_lo = hi, lo


@njit
def _adjust(buffer, p, change, partial):
    """Carry a change of the addresses into the checksums; ``partial``: the field holds the pseudo-header's sum."""
    if p.version == _V4:
        adjust(buffer, p.at + ipv4.CHECKSUM, change)
    if p.field == 0:
        return
    if partial:
        adjust_partial(buffer, p.field, change)
        return
    if p.protocol != _UDP and p.protocol != _UDP_LITE:
        adjust(buffer, p.field, change)
    elif le16(buffer, p.field) != 0:  # zero: the sender computed none (RFC 768)
        adjust(buffer, p.field, change)
        if le16(buffer, p.field) == 0:
            put_le16(buffer, p.field, 0xFFFF)


@njit
def outbound(buffer, p, f, partial):
    """Apply a flow's decision to a packet from its container."""
    _put_source(buffer, p, f.source_hi, f.source_lo)
    _put_destination(buffer, p, f.target_hi, f.target_lo)
    if f.delta_out != 0:
        _adjust(buffer, p, f.delta_out, partial)


@njit
def destination(buffer, p, hi, lo):
    """Replace the destination alone: an instance IP by the namespace address that it stands for."""
    change = delta(p.destination_hi, p.destination_lo, hi, lo)
    _put_destination(buffer, p, hi, lo)
    _adjust(buffer, p, change, False)


@njit
def inbound(buffer, p, f, partial):
    """Put the dialled address back into an answer."""
    _put_source(buffer, p, f.dialled_hi, f.dialled_lo)
    _adjust(buffer, p, f.delta_in, partial)
