"""Packets from one worker to another: those that the kernel's steering could not give to the owner of their flow.

The steering programs see a packet's addresses and ports where they usually are. The ports of a datagram in fragments,
of a packet behind IPv6 extension headers and of one quoted in an ICMP error are elsewhere; the worker that got such a
packet passes it to the one that owns its flow. (What is delivered to a container of this node takes another way,
through the tunnel port: see ``dataplane``.)

The kernel is the queue between workers: each has a socket on the loopback, from which it sends and on which it
receives. Only a sibling's port is believed. Four words precede the packet (``misses``): where it came from, and in
which pieces it is to leave.
"""

import numpy as np
from numba import njit

from appliance.dataplane import libc
from appliance.dataplane.memory import counters
from appliance.dataplane.misses import FROM_CONTAINER, KIND, META_LENGTH, NODE_HI, NODE_LO, PIECE_SHIFT, PORT
from appliance.dataplane.native import address_of, put_be16, put_le16, put_le64
from appliance.dataplane.state import IOV, IOV_LENGTH, NAME, NAME_LENGTH
from appliance.observe.counters import COUNTS, FROM_TUN, FROM_WIRE, Count, Drop
from appliance.tables import layout

LOOPBACK_HI, LOOPBACK_LO = layout.words("127.0.0.1")
_AF_INET6, _SOCKADDR_IN6 = 10, 28
_PART_SHIFT, _NEXT_SHIFT, _IDENTIFICATION_SHIFT = 32, 48, 32
_HANDED, _FAILED = COUNTS + Count.HANDED_OVER.value, Drop.SEND_FAILED.value


@njit
def describe(w, kind):
    """Make the words for a packet that the current one stands for: its origin, and its pieces if it has any."""
    meta, state, p = w.meta, w.state[0], w.packet[0]
    meta[KIND], meta[PORT] = kind, state.outer_port
    meta[NODE_HI], meta[NODE_LO] = state.outer_hi, state.outer_lo
    if p.piece:
        meta[KIND] |= w.pieces[0] << PIECE_SHIFT | w.pieces[1] << _PART_SHIFT | w.pieces[2] << _NEXT_SHIFT
        meta[PORT] |= w.pieces[3] << _IDENTIFICATION_SHIFT


@njit
def recall(w):
    """The reverse of ``describe``: the origin, and the pieces; gives the kind."""
    meta, state = w.meta, w.state[0]
    state.outer_port = meta[PORT] & 0xFFFF
    state.outer_hi, state.outer_lo = meta[NODE_HI], meta[NODE_LO]
    w.pieces[0], w.pieces[1] = (meta[KIND] >> PIECE_SHIFT) & 0xFFFF, (meta[KIND] >> _PART_SHIFT) & 0xFFFF
    w.pieces[2] = (meta[KIND] >> _NEXT_SHIFT) & 0xFF
    w.pieces[3] = (meta[PORT] >> _IDENTIFICATION_SHIFT) & 0xFFFFFFFF
    return meta[KIND] & ((1 << PIECE_SHIFT) - 1)


@njit
def pass_on(w, owner, kind, buffer, at, length):
    """Give a packet to a sibling, with whatever precedes it."""
    describe(w, kind)
    message, iov = w.hand_message, w.hand_iov
    put_le16(w.hand_name, 0, _AF_INET6)
    put_be16(w.hand_name, 2, np.int64(w.handoff_ports[owner]))
    put_le64(w.hand_name, 8, LOOPBACK_HI)
    put_le64(w.hand_name, 16, LOOPBACK_LO)
    iov[0], iov[1] = address_of(w.meta, 0), META_LENGTH
    iov[2], iov[3] = address_of(buffer, at), length
    message[NAME], message[NAME_LENGTH] = address_of(w.hand_name, 0), _SOCKADDR_IN6
    message[IOV], message[IOV_LENGTH] = address_of(iov, 0), 2
    if libc.sendmsg(w.libc, w.state[0].handoff, address_of(message, 0)) < 0:
        counters(w)[(FROM_TUN if kind == FROM_CONTAINER else FROM_WIRE) + _FAILED] += 1
        return
    counters(w)[_HANDED] += 1
