"""struct virtio_net_hdr: ten bytes before each packet on a TUN (virtio 1.2 §5.1.6, little endian)."""

from __future__ import annotations

import struct
from typing import NamedTuple

LAYOUT = "<BBHHHH"
SIZE = struct.calcsize(LAYOUT)

NEEDS_CSUM = 1  # flags: the checksum at csum_start + csum_offset is still to be finished
DATA_VALID = 2  # flags: the checksum has been verified

GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80  # may be set beside a TCP type: the super-packet carries CWR


class Vnet(NamedTuple):
    """The header's fields in their order on the device."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    @property
    def gso_kind(self) -> int:
        """The type of super-packet, without the ECN bit."""
        return self.gso_type & ~GSO_ECN

    @property
    def needs_csum(self) -> bool:
        return bool(self.flags & NEEDS_CSUM)

    def pack(self) -> bytes:
        return struct.pack(LAYOUT, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Vnet:
        return cls._make(struct.unpack(LAYOUT, data))


PLAIN = Vnet().pack()
