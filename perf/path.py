"""What a packet costs in the compiled path alone: the worker's own loop, over a kernel that costs next to nothing.

The system calls of ``dataplane.libc`` are replaced by compiled functions of this module: ``read`` and ``recvmmsg`` make
UDP packets of 64 bytes, each of another flow than the one before, in an order without pattern; ``sendmsg`` and
``writev`` forget what they get. What many live flows cost more than few is then the tables' and the caches' alone.
"""

from __future__ import annotations

import ipaddress
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cfunc, types

from appliance.dataplane import flow, libc, memory, misses, state, worker
from appliance.dataplane.native import copy, put_be16, put_le32, view
from appliance.dataplane.state import CONTROL_LENGTH, EVENT_DATA, EVENT_SIZE, IOV, MSGHDR_WORDS, NAME_SIZE, RECEIVED
from appliance.observe import counters
from appliance.tables import catalogue, layout, publish, read

SMALL, LARGE = 10, 100_000
PACKETS = 500_000
REPEATS = 7
CONTAINERS = 4
FLOWS_MAX = 131_072
"""Of the table, and of what the containers' ports can tell apart: a power of two."""
PAYLOAD = 64
CAPACITY = layout.Capacity(hosts=256, services=256, choices=256, maglev=16)
TUN, WIRE, HANDOFF, EPOLL = range(3, 7)
HERE, NODE, SERVICE, INSTANCE, TARGET, PORT = (
    "192.0.2.1",
    "192.0.2.2",
    "10.30.30.30",
    "10.30.0.200",
    "10.18.0.200",
    50103,
)

_VNET, _SOURCE, _DESTINATION, _SPORT, _DPORT = 10, 12, 16, 20, 22  # offsets in the packet are without the first
_SIZE = 28 + PAYLOAD
_GIVEN, _END, _FLOWS, _SIDE = range(4)  # packets given and to be given, live flows, from which side they come
_OUT, _BACK = range(2)


def _packet(source: str, destination: str, sport: int, dport: int) -> bytes:
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, _SIZE, 0, 0x4000, 64, 17, 0) + addresses
    words = sum(struct.unpack("!10H", header))
    header = header[:10] + struct.pack("!H", 0xFFFF - (words % 0xFFFF)) + header[12:]
    return header + struct.pack("!HHHH", sport, dport, 8 + PAYLOAD, 0) + bytes(PAYLOAD)


def container(number: int) -> str:
    """The namespace address of a container of this node. All have one checksum and the last byte apart."""
    return f"10.18.0.{2 + number}"


_words = np.zeros(4, np.int64)
_control = np.zeros(memory.CONTROL_COUNT, np.int64)
_errno = np.full(2, libc.EAGAIN, np.int32)
_templates = np.zeros((2 * CONTAINERS, _VNET + _SIZE), np.uint8)
_order = np.zeros(FLOWS_MAX, np.int64)
for _number in range(CONTAINERS):
    _sides = _packet(container(_number), SERVICE, 0, 80), _packet(INSTANCE, container(_number), 80, 0)
    for _side, _bytes in enumerate(_sides):
        _templates[2 * _number + _side] = np.frombuffer(bytes(_VNET) + _bytes, np.uint8)

# Compiled functions freeze these: where the arrays lie.
_WORDS, _CONTROL, _ERRNO, _TEMPLATES, _ORDER = (
    int(it.ctypes.data) for it in (_words, _control, _errno, _templates, _order)
)
_LONG, _INT = types.int64, types.int32


def _system_calls() -> tuple[Any, list[Any]]:
    """The table of the stand-ins, and what must live as long as it."""

    def _read(_fd: int, address: int, _length: int) -> int:
        words = view(_WORDS, 4, np.int64)
        if words[_SIDE] != _OUT or words[_GIVEN] >= words[_END]:
            return -1
        number = view(_ORDER, FLOWS_MAX, np.int64)[words[_GIVEN] % words[_FLOWS]]
        words[_GIVEN] += 1
        target = view(address, _VNET + _SIZE, np.uint8)
        templates = view(_TEMPLATES, 2 * CONTAINERS * (_VNET + _SIZE), np.uint8)
        copy(target, 0, templates, 2 * (number % CONTAINERS) * (_VNET + _SIZE), _VNET + _SIZE)
        put_be16(target, _VNET + _SPORT, 1 + number // CONTAINERS)
        return _VNET + _SIZE

    def _recvmmsg(fd: int, messages: int, count: int, _flags: int, _timeout: int) -> int:
        words = view(_WORDS, 4, np.int64)
        if fd != WIRE or words[_SIDE] != _BACK or words[_GIVEN] >= words[_END]:
            return -1
        count = min(count, words[_END] - words[_GIVEN])
        for i in range(count):
            number = view(_ORDER, FLOWS_MAX, np.int64)[words[_GIVEN] % words[_FLOWS]]
            words[_GIVEN] += 1
            message = view(messages + 8 * MSGHDR_WORDS * i, MSGHDR_WORDS, np.int64)
            target = view(view(message[IOV], 1, np.int64)[0], _SIZE, np.uint8)
            templates = view(_TEMPLATES, 2 * CONTAINERS * (_VNET + _SIZE), np.uint8)
            copy(target, 0, templates, (2 * (number % CONTAINERS) + 1) * (_VNET + _SIZE) + _VNET, _SIZE)
            put_be16(target, _DPORT, 1 + number // CONTAINERS)
            message[RECEIVED], message[CONTROL_LENGTH] = _SIZE, 0
        return count

    def _forget(_fd: int, _address: int, _count: int) -> int:
        return 1

    def _wait(_epoll: int, events: int, _count: int, milliseconds: int) -> int:
        words = view(_WORDS, 4, np.int64)
        if words[_GIVEN] < words[_END]:
            put_le32(view(events, EVENT_SIZE, np.uint8), EVENT_DATA, TUN if words[_SIDE] == _OUT else WIRE)
            return 1
        if milliseconds:
            view(_CONTROL, memory.CONTROL_COUNT, np.int64)[memory.STOP] = 1
        return 0

    def _where() -> int:  # errno
        return _ERRNO

    three = _LONG(_LONG, _LONG, _LONG)
    made = {
        libc.READ: cfunc(three)(_read),
        libc.WRITEV: cfunc(three)(_forget),
        libc.SENDMSG: cfunc(three)(_forget),
        libc.RECVMMSG: cfunc(_INT(_LONG, _LONG, _LONG, _LONG, _LONG))(_recvmmsg),
        libc.WAIT: cfunc(_INT(_LONG, _LONG, _LONG, _LONG))(_wait),
        libc.ERRNO: cfunc(_LONG())(_where),
    }
    table = libc.table()  # the clock stays the kernel's
    for place, function in made.items():
        table[place] = function.address
    return table, list(made.values())


@dataclass(frozen=True)
class Cost:
    """Nanoseconds a packet with so many live flows: the best of some turns."""

    flows: int
    out: float
    back: float


class Path:
    """One worker of a node with a few containers, whose service has an instance on another node."""

    def __init__(self) -> None:
        table, self._alive = _system_calls()
        self.counters = np.zeros(counters.WORDS, np.int64)
        self.counters[counters.ANNOUNCED] = publish.ASLEEP
        self._publisher = publish.Publisher(CAPACITY, lambda: [int(self.counters[counters.ANNOUNCED])])
        _publish(self._publisher)
        self._descriptor = self._publisher.descriptor()
        self._worker = state.make(
            state.Settings(system_calls=table),
            state.Descriptors(TUN, WIRE, HANDOFF, EPOLL),
            read.attach(self._descriptor, CAPACITY),
            np.zeros(FLOWS_MAX, flow.FLOW),
            self.counters,
            _control,
            np.zeros(misses.RING_WORDS, np.int64),
        )
        names = self._worker.record[0]["slot_names"]
        name = struct.pack("=H", 10) + struct.pack("!HI", PORT, 0) + layout.packed16(ipaddress.ip_address(NODE))
        for at in range(0, len(names), NAME_SIZE):
            names[at : at + len(name)] = np.frombuffer(name, np.uint8)

    def close(self) -> None:
        """Give the tables back."""
        self._publisher.close()
        os.close(self._descriptor)

    def cost(self, flows: int, packets: int = PACKETS, repeats: int = REPEATS) -> Cost:
        """Carries so many packets of so many flows, in both directions."""
        self._turn(_OUT, flows, flows, seed=1)  # opens them
        assert int(self.counters[counters.COUNTS + counters.Count.FLOWS_LIVE]) >= flows
        sides = (min(self._turn(side, flows, packets, seed) for seed in range(repeats)) for side in (_OUT, _BACK))
        return Cost(flows, *sides)

    def _turn(self, side: int, flows: int, packets: int, seed: int) -> float:
        """Nanoseconds a packet."""
        _order[:flows] = np.random.default_rng(seed).permutation(flows)
        _words[:] = 0, packets, flows, side
        _control[memory.STOP] = 0
        before, started = self._drops(), time.perf_counter_ns()
        worker.work(self._worker.record)
        took = time.perf_counter_ns() - started
        assert (self._drops(), int(_words[_GIVEN])) == (before, packets)
        return took / packets

    def _drops(self) -> int:
        return int(self.counters[counters.FROM_TUN : counters.WORDS].sum())


def _publish(publisher: publish.Publisher) -> None:
    publisher.set_ranges([ipaddress.ip_network("10.30.0.0/16")], [ipaddress.ip_network("10.16.0.0/12")])
    address = ipaddress.ip_address
    tables = catalogue.Catalogue(publisher)
    local = [
        catalogue.Host(address(container(n)), address(HERE), PORT, address(f"10.30.0.{n + 1}"), True, f"local{n}")
        for n in range(CONTAINERS)
    ]
    far = catalogue.Host(address(TARGET), address(NODE), PORT, address(INSTANCE), False, "far")
    services = [catalogue.Service(address(str(it.instance_ip)), "instance", (it.address,)) for it in (*local, far)]
    tables.replace_nodes([catalogue.Node(address(NODE), PORT, 0, True)])
    tables.replace([*local, far], [*services, catalogue.Service(address(SERVICE), "rr", (far.address,))])


def measure() -> Iterator[Cost]:
    """Few flows, then many, on the same worker."""
    path = Path()
    try:
        yield from (path.cost(flows) for flows in (SMALL, LARGE))
    finally:
        path.close()
