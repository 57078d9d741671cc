"""The packet path without the kernel: one worker over given tables, whose system calls only record.

Theory of operation
-------------------
*Owns* the memory of a worker that nobody else sees, and stand-ins for the functions that the packet path calls
(``dataplane.libc``). ``run`` lets the real, compiled loop take one packet, and gives what it would have done. Tables
are read, never written; flows and sticky clients are copies, so a run changes nothing outside.

What a real worker keeps in its private memory is not there: its place in a round robin, hosts that it learned from
packets, fragments and packets that wait.

A reader of the tables has to announce itself (``tables.publish``): the ``counters`` that it is given have this one's
announcement.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Any, Final

import numpy as np

from appliance.dataplane import libc, memory, misses, state, worker
from appliance.dataplane.wire import vnet
from appliance.observe import counters
from appliance.observe.counters import Drop
from appliance.supervisor.reports import refuse
from appliance.tables import layout
from appliance.tables.layout import IPAddress
from appliance.tables.publish import ASLEEP
from appliance.tables.read import Tables

_TUN, _WIRE, _HANDOFF, _EPOLL, _FRAGMENTING = range(1_000_000, 1_000_005)  # no descriptors: nothing is ever opened
_SECOND: Final = 1_000_000_000
_AF_INET6: Final = struct.pack("=H", 10)

Endpoint = tuple[IPAddress, int]


@dataclass(frozen=True)
class Outcome:
    """What a worker would have done: datagrams for nodes, packets into the TUN, drops, addresses asked for."""

    sent: list[tuple[Endpoint, bytes]]
    written: list[bytes]
    drops: dict[tuple[str, str], int]  # by direction and reason
    asked: list[IPAddress]
    records: Any = field(repr=False)  # flow records afterwards


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Message(ctypes.Structure):  # struct mmsghdr
    _fields_ = [("name", ctypes.c_uint64), ("name_length", ctypes.c_uint64), ("iov", ctypes.c_uint64)]
    _fields_ += [("iov_length", ctypes.c_uint64), ("control", ctypes.c_uint64), ("control_length", ctypes.c_uint64)]
    _fields_ += [("flags", ctypes.c_uint64), ("received", ctypes.c_uint64)]


class _Calls:
    """The stand-ins. A call gives what is queued, then EAGAIN; the loop's sleep ends it."""

    def __init__(self, control: Any, now: int) -> None:
        self.sent: list[tuple[Endpoint, bytes]] = []
        self.written: list[bytes] = []
        self.read: list[bytes] = []
        self.datagrams: list[tuple[Endpoint, bytes]] = []
        self._control, self._now, self._errno = control, now, ctypes.c_int(libc.EAGAIN)
        word, integer = ctypes.c_int64, ctypes.c_int
        three = ctypes.CFUNCTYPE(word, word, word, word)
        functions = {
            libc.READ: three(self._read),
            libc.WRITEV: three(self._writev),
            libc.SENDMSG: three(self._sendmsg),
            libc.RECVMMSG: ctypes.CFUNCTYPE(integer, word, word, word, word, word)(self._recvmmsg),
            libc.WAIT: ctypes.CFUNCTYPE(integer, word, word, word, word)(self._wait),
            libc.CLOCK: ctypes.CFUNCTYPE(integer, word, word, word)(self._clock),
            libc.ERRNO: ctypes.CFUNCTYPE(word)(lambda: ctypes.addressof(self._errno)),
            libc.WRITE: three(lambda _fd, _address, length: int(length)),
            libc.YIELD: ctypes.CFUNCTYPE(integer, word, word, word)(lambda *_: 0),
        }
        self._alive = functions
        addresses = [ctypes.cast(functions[number], ctypes.c_void_p).value or 0 for number in sorted(functions)]
        self.table = np.array(addresses, np.int64)

    def _read(self, _fd: int, address: int, length: int) -> int:
        if not self.read:
            return -1
        data = self.read.pop(0)[:length]
        ctypes.memmove(address, data, len(data))
        return len(data)

    def _writev(self, _fd: int, iov: int, count: int) -> int:
        data = _gather(iov, count)
        self.written.append(data[vnet.LENGTH :])
        return len(data)

    def _sendmsg(self, _fd: int, message: int, _flags: int) -> int:
        header = _Message.from_address(message)
        data = _gather(header.iov, header.iov_length)
        port, packed = struct.unpack("!2xH4x16s", ctypes.string_at(header.name, 24))
        address = IPv6Address(packed)
        self.sent.append(((address.ipv4_mapped or address, port), data))
        return len(data)

    def _recvmmsg(self, fd: int, messages: int, _count: int, _flags: int, _timeout: int) -> int:
        if fd != _WIRE or not self.datagrams:
            return -1
        (address, port), data = self.datagrams.pop(0)
        header = _Message.from_address(messages)
        ctypes.memmove(_Vector.from_address(header.iov).base, data, len(data))
        name = _AF_INET6 + struct.pack("!HI", port, 0) + layout.packed16(address) + bytes(4)
        ctypes.memmove(header.name, name, len(name))
        header.received, header.control_length = len(data), 0
        return 1

    def _wait(self, _epoll: int, _events: int, _count: int, timeout: int) -> int:
        if timeout:
            self._control[memory.STOP] = 1
        return 0

    def _clock(self, _clock: int, address: int, _zero: int) -> int:
        ctypes.memmove(address, struct.pack("=qq", self._now // _SECOND, self._now % _SECOND), 16)
        return 0


def _gather(iov: int, count: int) -> bytes:
    vectors = (_Vector * count).from_address(iov)
    return b"".join(ctypes.string_at(vector.base, vector.length) for vector in vectors)


class StandIn:
    """See the module. One use: ``run`` may be called once.

    ``settings``: the node's, of which number and count of workers, and offloads, do not count. ``now``: CLOCK_MONOTONIC
    nanoseconds. ``turn``: where round robins and the draws of ``least-flows`` begin.
    """

    def __init__(
        self,
        tables: Tables,
        settings: state.Settings,
        records: Any,
        sticky: Any,
        counted: Any,
        now: int,
        turn: int = 0,
    ) -> None:
        counted[:] = 0
        counted[counters.ANNOUNCED] = ASLEEP
        self._counters = counted
        self._control = np.zeros(memory.CONTROL_COUNT, np.int64)
        self._calls = _Calls(self._control, now)
        self._ring = np.zeros(misses.RING_WORDS, np.int64)
        self._records = records
        alone = state.Settings(
            port=settings.port, udp_gso=False, coalesce=False, seed=settings.seed, learn=settings.learn,
            system_calls=self._calls.table,
        )  # fmt: skip
        descriptors = state.Descriptors(_TUN, _WIRE, _HANDOFF, _EPOLL, (), _FRAGMENTING)
        self._worker = state.make(
            alone, descriptors, tables, records, counted, self._control, self._ring, sticky
        )
        self._worker.positions[:] = turn
        self._worker.record[0]["state"][0]["random"] = turn

    def run(self, packet: bytes, node: Endpoint | None = None, *, refused: bool = False) -> Outcome:
        """What the worker does with a packet of a container, or of another node.

        ``refused``: the cluster says of every address that it is asked for that nobody has it.
        """
        if node is None:
            self._calls.read.append(bytes(vnet.LENGTH) + packet)
        else:
            self._calls.datagrams.append((node, packet))
        worker.work(self._worker.record)
        asked = list(self._asked())
        if refused and asked:
            for address in asked:
                refuse(self._control, address)
            self._control[memory.STOP] = 0
            worker.work(self._worker.record)
        return Outcome(self._calls.sent, self._calls.written, self._drops(), asked, self._records)

    def _asked(self) -> Iterator[IPAddress]:
        """The addresses in the miss ring, which was empty."""
        for number in range(int(self._ring[misses.HEAD])):
            at = misses.RECORDS + misses.RECORD * number
            kind, hi, lo = (int(word) for word in self._ring[at : at + 3])
            if kind == misses.ADDRESS:
                yield layout.address(hi, lo)

    def _drops(self) -> dict[tuple[str, str], int]:
        bases = {"tun": counters.FROM_TUN, "wire": counters.FROM_WIRE}
        counted = {
            (direction, reason.label): int(self._counters[base + reason])
            for direction, base in bases.items()
            for reason in Drop
            if reason
        }
        return {key: count for key, count in counted.items() if count}


def copied_flows(tables: list[Any], owner: int) -> Any:
    """A copy of the live flows of all workers, with room for one more as long as the packet's owner has some.

    If it has none, only its own: which of them it would give up is then part of the answer.
    """
    live = [records[records["state"] != 0] for records in tables]
    if len(live[owner]) == len(tables[owner]):
        return live[owner]
    return np.concatenate([*live, np.zeros(1, tables[owner].dtype)])
