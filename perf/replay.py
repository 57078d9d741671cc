"""The compiled part of `perf.path`: system calls that take packets from memory, and the loops over a worker's stages.

A ring is RING places of STRIDE bytes. Its head, two words, is what the calls get as their descriptor: address of the
first place, and how many packets were taken so far."""

from typing import Any, Final

import numpy as np
from numba import cfunc, njit, types

from appliance.dataplane import libc, worker
from appliance.dataplane.inbound import inbound
from appliance.dataplane.native import view
from appliance.dataplane.outbound import outbound
from appliance.dataplane.wire import vnet

RING: Final = 1 << 17
"""Packets recorded: 16 MiB, more than a core's own caches hold, read in order."""
STRIDE: Final = 128
"""Bytes from one recorded packet to the next."""
PAYLOAD: Final = 64
PACKET: Final = 28 + PAYLOAD
WORDS: Final = -(-(vnet.LENGTH + PACKET) // 8)
NAME_AT: Final = 96
"""Where in a recorded datagram its sender stands."""
BASE, POSITION = range(2)
"""Words of a ring's head."""


@cfunc(types.int64(types.int64, types.int64, types.int64), cache=True)
def _read(ring, address, _length):
    """read(2) of the next recorded packet with its virtio header; the descriptor is the address of the ring's head."""
    head = view(ring, 2, np.int64)
    at = head[BASE] + (head[POSITION] & (RING - 1)) * STRIDE
    head[POSITION] += 1
    source, target = view(at, WORDS, np.int64), view(address, WORDS, np.int64)
    for i in range(WORDS):
        target[i] = source[i]
    return vnet.LENGTH + PACKET


@cfunc(types.int32(types.int64, types.int64, types.int64, types.int64, types.int64), cache=True)
def _recvmmsg(ring, messages, count, _flags, _timeout):
    """recvmmsg(2) of the next recorded datagrams; each has its sender's address behind it in the ring."""
    head = view(ring, 2, np.int64)
    for i in range(count):
        message = view(messages + 64 * i, 8, np.int64)
        at = head[BASE] + (head[POSITION] & (RING - 1)) * STRIDE
        head[POSITION] += 1
        source, slot = view(at, NAME_AT // 8, np.int64), view(message[2], 2, np.int64)[0]
        target = view(slot, NAME_AT // 8, np.int64)
        for word in range(NAME_AT // 8):
            target[word] = source[word]
        sender, name = view(at + NAME_AT, 3, np.int64), view(message[0], 3, np.int64)
        for word in range(3):
            name[word] = sender[word]
        message[5], message[7] = 0, PACKET
    return count


@cfunc(types.int64(types.int64, types.int64, types.int64), cache=True)
def _swallow(_fd, _message, _count):
    """sendmsg(2) and writev(2) that take everything."""
    return 1


def system_calls() -> Any:
    """Libc's table with the calls that move packets replaced."""
    table = libc.table()
    table[libc.READ], table[libc.RECVMMSG] = _read.address, _recvmmsg.address
    table[libc.SENDMSG] = table[libc.WRITEV] = _swallow.address
    return table


@njit(nogil=True, cache=True)
def send(workers, batches, size):
    """So many batches of packets from containers."""
    w = workers[0]
    for _ in range(batches):
        worker.begin_batch(w)
        outbound(w, size)


@njit(nogil=True, cache=True)
def receive(workers, batches, size):
    """So many batches of datagrams from other nodes."""
    w = workers[0]
    for _ in range(batches):
        worker.begin_batch(w)
        inbound(w, size)
