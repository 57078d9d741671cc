"""Who on this node listens on which port: what a node port must not take away.

Read from ``/proc/net``, of the namespace of the calling thread. The parser is pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from appliance.environment.addresses import IPAddress
from appliance.environment.firewall import Protocol

_FILES: Final[tuple[tuple[str, Protocol], ...]] = (("tcp", "tcp"), ("tcp6", "tcp"), ("udp", "udp"), ("udp6", "udp"))
_WAITING: Final = {"tcp": "0A", "udp": "07"}  # TCP_LISTEN; an unconnected UDP socket (include/net/tcp_states.h)


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that waits for anybody."""

    protocol: Protocol
    address: IPAddress
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this node reaches it, which node ports leave alone."""
        return self.address.is_loopback

    def meets(self, protocol: Protocol, port: int, address: IPAddress | None) -> bool:
        """Whether it would lose packets to a node port."""
        same = (self.protocol, self.port) == (protocol, port) and not self.is_loopback
        return same and (address is None or self.address.is_unspecified or self.address == address)


def listeners() -> list[Listener]:
    """All of the namespace."""
    return [it for name, protocol in _FILES for it in parse(_text(name), protocol)]


def parse(text: str, protocol: Protocol) -> Iterator[Listener]:
    """The listeners in a file such as ``/proc/net/tcp`` (proc(5))."""
    for line in text.splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        if state == _WAITING[protocol]:
            address, _, port = local.partition(":")
            yield Listener(protocol, _address(address), int(port, 16))


def _address(text: str) -> IPAddress:
    """Words of 32 bits in the byte order of the machine."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    if len(raw) == 4:
        return IPv4Address(raw)
    found = IPv6Address(raw)
    return found.ipv4_mapped or found


def _text(name: str) -> str:
    """The calling thread's file; without IPv6 there is none."""
    try:
        return Path(f"/proc/thread-self/net/{name}").read_text()
    except FileNotFoundError:
        return ""


def holder(protocol: Protocol, port: int, address: IPAddress | None, found: list[Listener]) -> Listener | None:
    """Who has a port already; None if nobody has."""
    return next((it for it in found if it.meets(protocol, port, address)), None)
