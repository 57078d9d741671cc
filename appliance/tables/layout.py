"""What the bytes of the shared tables mean. One place, for the writer, the compiled readers and the tools.

Addresses are 16 bytes in network order, IPv4 as IPv4-mapped IPv6 (RFC 4291 section 2.5.5.2), read as two machine words
``hi`` and ``lo`` exactly as they lie in memory: a packet's bytes compare without any conversion.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

MAGIC: Final = 0x4544474554424C31  # "EDGETBL1"
VERSION: Final = 3

# Words of the header, an int64 array.
H_MAGIC, H_VERSION, H_EPOCH, H_SEED, H_HOSTS, H_HOST_MASK, H_SERVICES, H_SERVICE_MASK, H_CHOICES = range(9)
H_RANGES: Final = 9  # number of ServiceIP ranges in use
H_NODES: Final = 10
H_NODE_MASK: Final = 11
H_GATEWAY4: Final = 12  # low word of this node's own IPv4 address inside the overlay; then both of its IPv6 one
H_GATEWAY6_HI: Final = 13
H_GATEWAY6_LO: Final = 14
H_OVERLAYS: Final = 15  # number of overlay ranges in use
H_GENERATION: Final = 16  # the last generation that an entry was given; no other process's entries may have it again
H_WORDS: Final = 24

HOST_LOCAL: Final = 1  # flag: the address is on this node
HOST_DOWN: Final = 2  # flag: no flow may stay with it; for the next writer, as readers go by the generation
HOST_OWNER: Final = 4  # flags: from this bit on a digest of the owner's name, for the next writer

HOST: Final = np.dtype(
    [
        ("address_hi", "i8"),
        ("address_lo", "i8"),  # namespace address: the key
        ("node_hi", "i8"),
        ("node_lo", "i8"),  # underlay address of its node
        ("instance_hi", "i8"),
        ("instance_lo", "i8"),  # instance IP of the same family; zero: none
        ("generation", "u4"),  # changes when the address gets another instance
        ("next", "u4"),
        ("port", "u2"),  # UDP port of its node, host order
        ("flags", "u2"),
        ("ordinal", "u4"),  # stays the same while the address is in the table: where a worker counts its flows to it
    ]
)

POLICY_RR: Final = 0
POLICY_INSTANCE: Final = 1
POLICY_CLOSEST: Final = 2
POLICY_LEAST_FLOWS: Final = 3
POLICY_MAGLEV: Final = 4

SERVICE_HASH_PORT: Final = 1  # flag, for maglev: the client's port is hashed too

# Maglev: 2,039 is prime, as the permutations of slots need it, and enough for 200 backends within about 10 %.
MAGLEV_SLOTS: Final = 2_039
MAGLEV_BLOCK: Final = 2_048  # slots of one ServiceIP's table, rounded up to whole cache lines
MAGLEV_CLIENT: Final = 0x436C69656E740000  # "Client": the hash that gives a client its slot, plus port and one
MAGLEV_OFFSET: Final = 0x4F66667365740000  # "Offset", "Skip": the hashes that give a backend its permutation of slots
MAGLEV_SKIP: Final = 0x536B697000000000
NO_TABLE: Final = 0xFFFFFFFF

SERVICE: Final = np.dtype(
    [
        ("address_hi", "i8"),
        ("address_lo", "i8"),  # ServiceIP: the key
        ("choices", "u4"),  # first place in the choice list
        ("count", "u4"),
        ("ordinal", "u4"),  # stays the same while the ServiceIP lives: where a worker keeps its round-robin position
        ("next", "u4"),
        ("generation", "u4"),  # changes when an instance left the choice list: UDP flows look whether it was theirs
        ("policy", "u1"),
        ("flags", "u1"),
        ("reserved", "u2"),
        ("near", "u4"),  # how many places, from the first on, the policy chooses among; all but for ``closest``
        ("table", "u4"),  # maglev: number of its table
        ("sticky", "u4"),  # seconds for which a client keeps its instance; 0: not at all
        ("reserved2", "u4"),
        ("reserved3", "i8"),
    ]
)

# A place of a choice list: the namespace address of a backend. It is there as often as its weight says, which for
# maglev is once: there its weight is in the table.
CHOICE: Final = np.dtype([("address_hi", "i8"), ("address_lo", "i8"), ("weight", "u4"), ("reserved", "u4")])

NODE_OURS: Final = 1  # flag: runs this appliance, so an instance IP may be a packet's destination on the wire

NODE: Final = np.dtype(
    [
        ("address_hi", "i8"),
        ("address_lo", "i8"),  # underlay address: the key
        ("next", "u4"),
        ("mtu", "u4"),  # of the path to it, bytes of an IP packet on the underlay; 0: unknown
        ("port", "u2"),  # its tunnel port, host order
        ("flags", "u2"),
        ("reserved", "u4"),
        ("reserved2", "i8", 4),
    ]
)

# A range of addresses: prefix words and mask words.
RANGE: Final = np.dtype([("hi", "i8"), ("lo", "i8"), ("mask_hi", "i8"), ("mask_lo", "i8")])
RANGES_MAX: Final = 16

assert HOST.itemsize == SERVICE.itemsize == NODE.itemsize == 64  # one cache line each


@dataclass(frozen=True)
class Capacity:
    """How many entries of each kind the tables hold."""

    hosts: int = 65_536
    services: int = 16_384
    choices: int = 131_072
    maglev: int = 1_024  # tables
    nodes: int = 8_192


Section = tuple[str, "np.dtype[np.void] | np.dtype[np.int64] | np.dtype[np.uint32] | np.dtype[np.uint16]", int]


def buckets_for(capacity: int) -> int:
    """Power of two not below the capacity: at most one entry a bucket on average."""
    return 1 << max(4, (capacity - 1).bit_length())


def sections(capacity: Capacity) -> list[Section]:
    """Name, type and length of each array of the tables, in the order in which they lie in memory."""
    return [
        ("header", np.dtype(np.int64), H_WORDS),
        ("ranges", RANGE, RANGES_MAX),
        ("overlays", RANGE, RANGES_MAX),
        ("host_buckets", np.dtype(np.uint32), buckets_for(capacity.hosts)),
        ("hosts", HOST, capacity.hosts),
        ("service_buckets", np.dtype(np.uint32), buckets_for(capacity.services)),
        ("services", SERVICE, capacity.services),
        ("choices", CHOICE, capacity.choices),
        ("maglev", np.dtype(np.uint16), capacity.maglev * MAGLEV_BLOCK),
        ("node_buckets", np.dtype(np.uint32), buckets_for(capacity.nodes)),
        ("nodes", NODE, capacity.nodes),
    ]


IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
_MAPPED = b"\0" * 10 + b"\xff\xff"


class TableIPv4(ipaddress.IPv4Address):
    """An IPv4 address that is made once and looked up often: its hash and its 16 bytes are remembered.

    ``ipaddress`` formats a number as text for each hash, which was a fifth of publishing a large cluster.
    """

    __slots__ = ("_hash", "packed16")

    def __init__(self, packed: bytes) -> None:
        super().__init__(packed)
        self._hash = super().__hash__()
        self.packed16 = _MAPPED + packed

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return TableIPv4, (self.packed,)


class TableIPv6(ipaddress.IPv6Address):
    """The same for IPv6."""

    __slots__ = ("_hash", "packed16")

    def __init__(self, packed: bytes) -> None:
        super().__init__(packed)
        self._hash = super().__hash__()
        self.packed16 = packed

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return TableIPv6, (self.packed,)


def packed16(address: IPAddress) -> bytes:
    """The 16 bytes of an address, IPv4 as IPv4-mapped."""
    if isinstance(address, TableIPv4 | TableIPv6):
        return address.packed16
    return _MAPPED + address.packed if address.version == 4 else address.packed


def words(address: IPAddress | str) -> tuple[int, int]:
    """The two table words of an address."""
    if isinstance(address, str):
        address = ipaddress.ip_address(address)
    hi, lo = struct.unpack("=qq", packed16(address))
    return hi, lo


def words_of(addresses: Iterable[IPAddress]) -> Any:
    """The table words of addresses, an int64 array of two columns."""
    return np.frombuffer(b"".join(map(packed16, addresses)), dtype=np.int64).reshape(-1, 2)


def address(hi: int, lo: int) -> IPAddress:
    """The address of two table words: the reverse of :func:`words`."""
    full = ipaddress.IPv6Address(struct.pack("=qq", hi, lo))
    return full.ipv4_mapped or full


def range_row(network: IPNetwork) -> tuple[int, int, int, int]:
    """A network as prefix and mask words, IPv4 inside ``::ffff:0:0/96``."""
    bits = network.prefixlen + (96 if network.version == 4 else 0)
    mask = ((1 << bits) - 1) << (128 - bits)
    mask_hi, mask_lo = struct.unpack("=qq", mask.to_bytes(16, "big"))
    return (*words(network.network_address), mask_hi, mask_lo)
