"""The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

Sums are kept in machine (little-endian) 16-bit order: a one's complement sum comes out byte-swapped with its input
(RFC 1071 section 2 B), so nothing needs swapping but numbers that are not in memory.
"""

import numpy as np
from numba import njit

from appliance.dataplane.native import le16, le32, le64, put_le16


@njit
def fold(value):
    """A sum of 16-bit words, carried around into 16 bits."""
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


@njit
def swap(value):
    """A 16-bit number in the other byte order."""
    return ((value & 0xFF) << 8) | ((value >> 8) & 0xFF)


@njit
def total(buffer, at, length):
    """One's complement sum of a range of bytes, folded. The loop over 64-bit words becomes vector instructions."""
    value = np.int64(0)
    for i in range(length >> 3):
        word = le64(buffer, at + (i << 3))
        value += (word & 0xFFFFFFFF) + ((word >> 32) & 0xFFFFFFFF)
    tail = at + (length & ~7)
    if length & 4:
        value += le32(buffer, tail)
        tail += 4
    if length & 2:
        value += le16(buffer, tail)
        tail += 2
    if length & 1:
        value += np.int64(buffer[tail])
    value = (value & 0xFFFFFFFF) + (value >> 32)
    return fold(value)


@njit
def words_total(hi, lo):
    """Sum of an address's two words."""
    value = np.int64(0)
    for shift in (0, 16, 32, 48):
        value += ((hi >> shift) & 0xFFFF) + ((lo >> shift) & 0xFFFF)
    return fold(value)


@njit
def delta(old_hi, old_lo, new_hi, new_lo):
    """What replacing one address by another adds to a sum (RFC 1624: ~m + m'); 0 only if they are the same."""
    if old_hi == new_hi and old_lo == new_lo:
        return np.int64(0)
    return fold((0xFFFF - words_total(old_hi, old_lo)) + words_total(new_hi, new_lo))


@njit
def adjust(buffer, at, change):
    """Update an inverted checksum field by a change of the sum (RFC 1624 equation 3)."""
    put_le16(buffer, at, 0xFFFF - fold((0xFFFF - le16(buffer, at)) + change))


@njit
def adjust_partial(buffer, at, change):
    """Update a field that holds the pseudo-header's sum, not inverted (CHECKSUM_PARTIAL)."""
    put_le16(buffer, at, fold(le16(buffer, at) + change))
