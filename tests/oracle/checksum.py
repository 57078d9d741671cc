"""The Internet checksum: a 16-bit ones' complement sum (RFC 1071) and its incremental update (RFC 1624).

In ones' complement 0x0000 and 0xffff are the same number. UDP alone tells them apart: a field of 0 means
"not computed" (RFC 768), so a checksum that comes out as 0 is sent as 0xffff.
"""

from __future__ import annotations

import struct

from tests.oracle.model import Address


def fold(total: int) -> int:
    """A sum of 16-bit words with its carries added back in (RFC 1071 §1)."""
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def words(data: bytes) -> int:
    """The ones' complement sum of data, not inverted; an odd last byte counts as the high half of a word."""
    padded = data + b"\0" * (len(data) % 2)
    return fold(sum(struct.unpack(f"!{len(padded) // 2}H", padded)))


def checksum(data: bytes, initial: int = 0) -> int:
    """What goes into a checksum field that is zero, or left out, in data."""
    return 0xFFFF - fold(words(data) + initial)


def pseudo_sum(source: Address, destination: Address, protocol: int, length: int) -> int:
    """The sum of the pseudo-header: RFC 9293 §3.1 and RFC 768 for IPv4, RFC 8200 §8.1 for IPv6."""
    addresses = words(source.packed) + words(destination.packed)
    return fold(addresses + protocol + length)


def moved(total: int, old: bytes, new: bytes) -> int:
    """A sum, not inverted, after `old` in the summed data has become `new`."""
    return fold(total + (0xFFFF - words(old)) + words(new))


def updated(field: int, old: bytes, new: bytes) -> int:
    """A checksum field after `old` has become `new` (RFC 1624 equation 3): as right or as wrong as it was."""
    return 0xFFFF - moved(0xFFFF - field, old, new)
