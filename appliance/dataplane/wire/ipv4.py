"""IPv4 header (RFC 791 section 3.1): offsets and what is read at them."""

from numba import njit

from appliance.dataplane.native import be16, put_be16, put_le16
from appliance.dataplane.wire.checksum import fold, total

TOTAL_LENGTH, ID, FRAGMENT, TTL, PROTOCOL, CHECKSUM, SOURCE, DESTINATION = 2, 4, 6, 8, 9, 10, 12, 16
HEADER_MIN = 20
FRAGMENT_BITS = 0x3FFF  # more fragments, and the offset
OFFSET_BITS = 0x1FFF  # in units of 8 bytes
MORE_FRAGMENTS = 0x2000
DONT_FRAGMENT = 0x4000


@njit
def header_length(buffer, at):
    """Length of the header with options, bytes."""
    return (buffer[at] & 0x0F) << 2


@njit
def is_fragment(buffer, at):
    """Whether the packet is a fragment of a datagram, the first included."""
    return be16(buffer, at + FRAGMENT) & FRAGMENT_BITS != 0


@njit
def set_length(buffer, at, length, header):
    """Set the total length and compute the header checksum anew."""
    put_be16(buffer, at + TOTAL_LENGTH, length)
    put_le16(buffer, at + CHECKSUM, 0)
    put_le16(buffer, at + CHECKSUM, 0xFFFF - fold(total(buffer, at, header)))


@njit
def identification(buffer, at):
    """The identification field."""
    return be16(buffer, at + ID)

