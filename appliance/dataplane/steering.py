"""Which worker owns a packet: one hash, computed by compiled Python here and by eBPF in the kernel.

Both directions of a flow share, on one node, the local namespace address and the two ports. Outbound at the TUN that is
the source address, inbound on the wire the destination address. The ports enter as a sum, so that direction does not
matter; for ICMP echo the identifier takes their place. IPv4 fragments and IPv6 extension headers count as no ports.

The eBPF programs are socket filters, assembled here and loaded through bpf(2): no compiler on the gateway. They
return the worker's number, already reduced modulo the number of workers: the kernel keeps only 16 bits of a TUN
steering result (drivers/net/tun.c, tun_ebpf_select_queue), and wants a socket's index of a reuseport program
(net/core/sock_reuseport.c).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from appliance.dataplane.bpf import ABSOLUTE, Assembler

_PORT_MIX, _MIX1, _MIX2 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35  # golden ratio; murmur3 finalizer
_MAPPED = 0xFFFF  # third 32-bit word of an IPv4-mapped address: makes both families one formula


@njit
def steer(hi, lo, sport, dport):
    """Hash of a local address and a port pair (its 16-bit parts), 32 bits."""
    both = hi ^ lo
    both = (both ^ (both >> 32)) & 0xFFFFFFFF
    address = ((both & 0xFF) << 24) | ((both & 0xFF00) << 8) | ((both >> 8) & 0xFF00) | (both >> 24)
    h = (address + (((sport & 0xFFFF) + (dport & 0xFFFF)) * _PORT_MIX)) & 0xFFFFFFFF
    h ^= h >> 16
    h = np.int64((np.uint64(h) * np.uint64(_MIX1)) & np.uint64(0xFFFFFFFF))
    h ^= h >> 13
    h = np.int64((np.uint64(h) * np.uint64(_MIX2)) & np.uint64(0xFFFFFFFF))
    return h ^ (h >> 16)


# Registers: r0 result of loads, r6 context (as BPF_ABS wants it), r7 address, r8 ports, r9 IPv4 header length.
_R0, _R1, _R6, _R7, _R8, _R9 = 0, 1, 6, 7, 8, 9


def program(workers: int, *, inbound: bool) -> bytes:
    """The steering program of the TUN (source address) or, ``inbound``, of the tunnel sockets (destination address).

    A load beyond the packet ends the program with 0, so garbage goes to worker 0, which counts it.
    """
    asm = Assembler()
    asm.mov_reg(_R6, _R1)
    asm.mov(_R8, 0)
    asm.load(ABSOLUTE, 1, 0)
    asm.rsh(_R0, 4)
    asm.jump_if_equal(_R0, 6, "ipv6")
    asm.jump_if_not_equal(_R0, 4, "other")
    _ipv4(asm, 16 if inbound else 12)
    asm.label("ipv6")
    _ipv6(asm, 24 if inbound else 8)
    asm.label("hash")
    _hash(asm, workers)
    asm.label("other")
    asm.mov(_R0, 0)
    asm.exit()
    return asm.assemble()


def _ipv4(asm: Assembler, address: int) -> None:
    asm.load(ABSOLUTE, 4, address)
    asm.mov_reg(_R7, _R0)
    asm.xor(_R7, _MAPPED)
    asm.load(ABSOLUTE, 2, 6)
    asm.and_(_R0, 0x3FFF)  # more fragments, or an offset
    asm.jump_if_not_equal(_R0, 0, "hash")
    asm.load(ABSOLUTE, 1, 0)
    asm.and_(_R0, 0x0F)
    asm.lsh(_R0, 2)
    asm.mov_reg(_R9, _R0)
    asm.load(ABSOLUTE, 1, 9)
    asm.jump_if_equal(_R0, 1, "icmp4")
    for protocol in (6, 17, 132):
        asm.jump_if_equal(_R0, protocol, "ports4")
    asm.jump("hash")
    asm.label("icmp4")
    asm.load_indirect(2, _R9, 4)
    asm.mov_reg(_R8, _R0)
    asm.jump("hash")
    asm.label("ports4")
    asm.load_indirect(2, _R9, 0)
    asm.mov_reg(_R8, _R0)
    asm.load_indirect(2, _R9, 2)
    asm.add_reg(_R8, _R0)
    asm.jump("hash")


def _ipv6(asm: Assembler, address: int) -> None:
    asm.mov(_R7, 0)
    for word in range(4):
        asm.load(ABSOLUTE, 4, address + 4 * word)
        asm.xor_reg(_R7, _R0)
    asm.load(ABSOLUTE, 1, 6)
    asm.jump_if_equal(_R0, 58, "icmp6")
    for protocol in (6, 17, 132):
        asm.jump_if_equal(_R0, protocol, "ports6")
    asm.jump("hash")
    asm.label("icmp6")
    asm.load(ABSOLUTE, 2, 44)
    asm.mov_reg(_R8, _R0)
    asm.jump("hash")
    asm.label("ports6")
    asm.load(ABSOLUTE, 2, 40)
    asm.mov_reg(_R8, _R0)
    asm.load(ABSOLUTE, 2, 42)
    asm.add_reg(_R8, _R0)


def _hash(asm: Assembler, workers: int) -> None:
    """The same steps as :func:`steer`, in 32-bit arithmetic, and the remainder."""
    asm.mul(_R8, _PORT_MIX)
    asm.add_reg(_R7, _R8)
    for shift, factor in ((16, _MIX1), (13, _MIX2), (16, None)):
        asm.mov_reg(_R0, _R7)
        asm.rsh(_R0, shift)
        asm.xor_reg(_R7, _R0)
        if factor is not None:
            asm.mul(_R7, factor)
    asm.mov_reg(_R0, _R7)
    asm.mod(_R0, workers)
    asm.exit()


