"""What a container may send: frames that are its own. A classifier at the node's end of its link, in eBPF.

Theory of operation
-------------------
Containers of one node share a bridge, and a bridge asks nobody where a frame comes from: one container could use a
neighbour's address towards the overlay and the neighbours themselves, or have a neighbour's packets sent to itself, by
its answers to ARP and neighbour discovery or by its source alone. So each container's link has a program of its own,
made for its addresses, where frames arrive at the node (clsact ingress, tc-bpf(8)): before bridge, rules and worker.
The program lives and dies with the link, as the attachment's record does, and is in place before the link is up.

===========================  ======================================================================================
frame                        passes if
===========================  ======================================================================================
any                          its hardware address is not that of another container (``names.container_mac``)
IPv4                         its source is the container's address
ARP (RFC 826)                its sender is the container's address, or none yet (a probe, RFC 5227)
IPv6                         its source is the container's address, link-local, or none yet (::)
· neighbour advertisement    its target is the container's address, or link-local (RFC 4861 section 4.4)
· router advertisement,      never: the gateway is the node's bridge (RFC 6105)
  redirect
· headers before ICMPv6      at most ``HEADERS_MAX`` that may come before neighbour discovery; more: never
anything else                never
===========================  ======================================================================================

A frame that ends before what is looked at passes: whoever gets it cannot read it either. Fragments of neighbour
discovery are not looked at, as nobody takes them (RFC 6980). The kernel counts what is dropped (``tc -s qdisc show dev
LINK clsact``; ``forged`` in ``status``). Further programs of others at the same place still run, after this one.

The filter's name tells its program apart from any other, so that a link is known to be guarded by the present version
for its present addresses (``name``).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from hashlib import blake2s
from typing import Final

from appliance.dataplane.bpf import ABSOLUTE, Assembler
from appliance.environment import names
from appliance.environment.addresses import IPAddress, v4_of, v6_of

HEADERS_MAX: Final = 4
PRIORITY: Final = 234
"""Among the filters of a link; lower ones of others come first."""
HANDLE: Final = 1

_PASS, _DROP = -1, 2  # TC_ACT_UNSPEC: whatever filter comes next decides; TC_ACT_SHOT (linux/pkt_cls.h)
_R0, _R1, _R6, _R7, _R8 = 0, 1, 6, 7, 8  # result of a load; context; the same where a load wants it; place; next header
_ETHERNET: Final = 14
_SOURCE, _TYPE = 6, 12
_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD
_IPV4_SOURCE, _ARP_SENDER = _ETHERNET + 12, _ETHERNET + 14
_NEXT, _IPV6_SOURCE, _IPV6_END = _ETHERNET + 6, _ETHERNET + 8, _ETHERNET + 40
_EXTENSIONS, _ICMP6 = (0, 43, 60), 58  # hop-by-hop options, routing, destination options
_ROUTER_ADVERTISEMENT, _NEIGHBOUR_ADVERTISEMENT, _REDIRECT = 134, 136, 137
_TARGET: Final = 8  # of a neighbour advertisement, from its type on
_LINK_LOCAL, _LINK_LOCAL_MASK = 0xFE800000, 0xFFC00000


def name(addresses: Iterable[IPAddress]) -> str:
    """The filter of a container with these addresses, IPv4 first."""
    return f"edge-{blake2s(program(tuple(addresses)), digest_size=8).hexdigest()}"


@cache
def program(addresses: tuple[IPAddress, ...]) -> bytes:
    """The classifier of a container with these addresses, IPv4 first, at most one a family."""
    asm = Assembler()
    asm.mov_reg(_R6, _R1)
    _hardware(asm, addresses)
    asm.load(ABSOLUTE, 2, _TYPE)
    v4, v6 = v4_of(addresses), v6_of(addresses)
    if v4 is not None:
        asm.jump_if_equal(_R0, _IPV4, "ipv4")
        asm.jump_if_equal(_R0, _ARP, "arp")
    if v6 is not None:
        asm.jump_if_equal(_R0, _IPV6, "ipv6")
    asm.jump("drop")
    if v4 is not None:
        _ipv4(asm, int(v4))
    if v6 is not None:
        _ipv6(asm, v6.packed)
    for label, verdict in (("pass", _PASS), ("drop", _DROP)):
        asm.label(label)
        asm.mov(_R0, verdict)
        asm.exit()
    return asm.assemble()


def _hardware(asm: Assembler, addresses: tuple[IPAddress, ...]) -> None:
    """A bridge learns where a hardware address is from the source of any frame."""
    own = bytes.fromhex(names.container_mac(addresses[0]).replace(":", ""))
    asm.load(ABSOLUTE, 2, _SOURCE)
    asm.jump_if_not_equal(_R0, int.from_bytes(own[:2], "big"), "no container's")
    asm.load(ABSOLUTE, 4, _SOURCE + 2)
    asm.jump_if_not_equal(_R0, int.from_bytes(own[2:], "big"), "drop")
    asm.label("no container's")


def _ipv4(asm: Assembler, own: int) -> None:
    asm.label("ipv4")
    asm.load(ABSOLUTE, 4, _IPV4_SOURCE)
    asm.jump_if_equal(_R0, own, "pass")
    asm.jump("drop")
    asm.label("arp")
    asm.load(ABSOLUTE, 4, _ARP_SENDER)
    asm.jump_if_equal(_R0, own, "pass")
    asm.jump_if_equal(_R0, 0, "pass")
    asm.jump("drop")


def _ipv6(asm: Assembler, own: bytes) -> None:
    asm.label("ipv6")
    asm.mov(_R7, _IPV6_SOURCE)
    _unless(asm, own, "other source")
    asm.jump("source")
    asm.label("other source")
    _if_link_local(asm, "source")
    _unless(asm, bytes(16), "drop")
    asm.label("source")
    asm.load(ABSOLUTE, 1, _NEXT)
    asm.mov_reg(_R8, _R0)
    asm.mov(_R7, _IPV6_END)
    for number in range(HEADERS_MAX):
        _skip_header(asm, number)
    asm.jump_if_equal(_R8, _ICMP6, "icmp")
    for extension in _EXTENSIONS:
        asm.jump_if_equal(_R8, extension, "drop")
    asm.jump("pass")
    asm.label("icmp")
    asm.load_indirect(1, _R7, 0)
    asm.jump_if_equal(_R0, _ROUTER_ADVERTISEMENT, "drop")
    asm.jump_if_equal(_R0, _REDIRECT, "drop")
    asm.jump_if_not_equal(_R0, _NEIGHBOUR_ADVERTISEMENT, "pass")
    asm.mov(_R0, _TARGET)
    asm.add_reg(_R7, _R0)
    _unless(asm, own, "other target")
    asm.jump("pass")
    asm.label("other target")
    _if_link_local(asm, "pass")
    asm.jump("drop")


def _skip_header(asm: Assembler, number: int) -> None:
    """Step over an extension header, if one comes next: next header, length in units of 8 bytes (RFC 8200)."""
    for extension in _EXTENSIONS:
        asm.jump_if_equal(_R8, extension, f"extension {number}")
    asm.jump(f"after {number}")
    asm.label(f"extension {number}")
    asm.load_indirect(1, _R7, 0)
    asm.mov_reg(_R8, _R0)
    asm.load_indirect(1, _R7, 1)
    asm.lsh(_R0, 3)
    asm.add_reg(_R7, _R0)
    asm.mov(_R0, 8)
    asm.add_reg(_R7, _R0)
    asm.label(f"after {number}")


def _unless(asm: Assembler, address: bytes, label: str) -> None:
    """Jump unless this address stands where r7 points."""
    for word in range(0, 16, 4):
        asm.load_indirect(4, _R7, word)
        asm.jump_if_not_equal(_R0, int.from_bytes(address[word : word + 4], "big"), label)


def _if_link_local(asm: Assembler, label: str) -> None:
    """Jump if a link-local address stands where r7 points."""
    asm.load_indirect(4, _R7, 0)
    asm.and_(_R0, _LINK_LOCAL_MASK)
    asm.jump_if_equal(_R0, _LINK_LOCAL, label)
