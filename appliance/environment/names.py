"""Names and hardware addresses that follow from what they belong to.

Nothing here is drawn at random: after a crash the same container gets the same link name, so that what
is left of it is found and recognised, and an address that is given to another container keeps its
hardware address, so that no neighbour's cache is ever wrong about it.
"""

import itertools
import re
from collections.abc import Collection
from hashlib import blake2s
from ipaddress import IPv4Address, IPv6Address
from typing import Final

VETH_PREFIX: Final = "ea"
OFFERED_PREFIX: Final = "eo"
VETH_DIGITS: Final = 10
"""12 characters of the 15 that a name may have; at 10,000 containers two collide with p = 5e-5."""

_VETH = re.compile(rf"{VETH_PREFIX}[0-9a-f]{{{VETH_DIGITS}}}")
_CONTAINER_OUI: Final = bytes((0x02, 0xEA))
_BRIDGE_OUI: Final = bytes((0x02, 0xEB))
"""Locally administered, unicast: bit 1 of the first octet set, bit 0 clear (IEEE 802-2014, 8.4)."""


def veth_name(service: str, instance: int) -> str:
    """The node's end of a container's link."""
    return VETH_PREFIX + _digest(f"{service}\0{instance}", VETH_DIGITS // 2).hex()


def offered_name(service: str, instance: int) -> str:
    """The container's end of a link, while it is on the node for a runtime that moves it itself."""
    return OFFERED_PREFIX + veth_name(service, instance).removeprefix(VETH_PREFIX)


def is_veth_name(name: str) -> bool:
    """Whether `veth_name` could have made this name."""
    return _VETH.fullmatch(name) is not None


def container_mac(address: IPv4Address | IPv6Address) -> str:
    """The container's hardware address; for IPv4 as unique on the node as the address is."""
    tail = address.packed if address.version == 4 else _digest(str(address), 4)
    return _mac(_CONTAINER_OUI + tail)


def bridge_mac(name: str) -> str:
    """The bridge's hardware address. A bridge without one of its own takes that of a port, and changes
    it when the port goes: every container would then send to an address that nobody has."""
    return _mac(_BRIDGE_OUI + _digest(name, 4))


def free_interface_name(taken: Collection[str]) -> str:
    """The first of eth0, eth1, … that a container has not."""
    return next(name for number in itertools.count() if (name := f"eth{number}") not in taken)


def _digest(text: str, size: int) -> bytes:
    return blake2s(text.encode(), digest_size=size).digest()


def _mac(octets: bytes) -> str:
    return octets.hex(":")
