"""The compiled packet path without the kernel: one worker whose system calls are replaced.

``CompiledPath`` runs the real loop (``staged.forward``) for one input: its sleep is answered by the stop word, its
reads by what the test queued, and what it sends and writes is recorded. Errors can be injected into every call.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import struct
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from appliance.dataplane import flow, libc, memory, misses, source, staged, state
from appliance.observe import counters
from appliance.observe.counters import Drop
from appliance.supervisor import reports
from appliance.tables import catalogue, layout, publish, read
from tests.oracle.model import Outcome, World

CAPACITY = layout.Capacity(hosts=256, services=256, choices=1024, maglev=16)
TUN, WIRE, HANDOFF, EPOLL, FRAGMENTING = range(3, 8)
_SECOND = 1_000_000_000


class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class MsgHdr(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_uint64),
        ("name_length", ctypes.c_uint64),
        ("iov", ctypes.c_uint64),
        ("iov_length", ctypes.c_uint64),
        ("control", ctypes.c_uint64),
        ("control_length", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("received", ctypes.c_uint64),
    ]


def gather(address: int, count: int) -> bytes:
    """The bytes that an array of struct iovec points at."""
    vectors = (IoVec * count).from_address(address)
    return b"".join(ctypes.string_at(vector.base, vector.length) for vector in vectors)


class SystemCalls:
    """Stand-ins for the calls of ``libc``, bound to queues."""

    def __init__(self, control: Any) -> None:
        self.errno = ctypes.c_int(0)
        self.now = 1_000 * _SECOND
        self.tun_reads: deque[bytes] = deque()
        self.datagrams: deque[tuple[tuple[str, int], bytes, int]] = deque()
        self.handed: deque[tuple[tuple[str, int], bytes, int]] = deque()
        self.written: list[bytes] = []
        self.sent: list[tuple[int, str, int, bytes, int]] = []  # fd, address, port, bytes, segment size
        self.fail_send: Callable[[int, bytes, int], int] = lambda fd, data, size: 0
        self.fail_write: Callable[[bytes], int] = lambda data: 0
        self.polls = False
        """Whether a look without sleeping tells which descriptors have something; otherwise none has."""
        self.turn_ns = 0
        """How much later it is each time that somebody asks."""
        self._control = control
        long, integer = ctypes.c_int64, ctypes.c_int
        self._callbacks = [
            ctypes.CFUNCTYPE(long, long, long, long)(self._read),
            ctypes.CFUNCTYPE(long, long, long, long)(self._writev),
            ctypes.CFUNCTYPE(long, long, long, long)(self._sendmsg),
            ctypes.CFUNCTYPE(integer, long, long, long, long, long)(self._recvmmsg),
            ctypes.CFUNCTYPE(integer, long, long, long, long)(self._wait),
            ctypes.CFUNCTYPE(integer, long, long, long)(self._clock),
            ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: ctypes.addressof(self.errno)),
            ctypes.CFUNCTYPE(long, long, long, long)(lambda _fd, _address, length: length),
        ]
        self.table = np.array([ctypes.cast(c, ctypes.c_void_p).value for c in self._callbacks], np.int64)

    def _fail(self, code: int) -> int:
        self.errno.value = code
        return -1

    def _read(self, _fd: int, address: int, length: int) -> int:
        if not self.tun_reads:
            return self._fail(libc.EAGAIN)
        data = self.tun_reads.popleft()[:length]
        ctypes.memmove(address, data, len(data))
        return len(data)

    def _writev(self, _fd: int, iov: int, count: int) -> int:
        data = gather(iov, count)
        code = self.fail_write(data)
        if code:
            return self._fail(code)
        self.written.append(data)
        return len(data)

    def _sendmsg(self, fd: int, message: int, _flags: int) -> int:
        header = MsgHdr.from_address(message)
        data = gather(header.iov, header.iov_length)
        size = 0
        if header.control_length:
            length, level, kind, size = struct.unpack("=QiiH", ctypes.string_at(header.control, 18))
            assert (length, level, kind) == (18, 17, 103)
        code = self.fail_send(fd, data, size)
        if code:
            return self._fail(code)
        _, port, _, address = struct.unpack("!HHI16s", ctypes.string_at(header.name, 24))
        ip = ipaddress.IPv6Address(address)
        self.sent.append((fd, str(ip.ipv4_mapped or ip), port, data, size))
        return len(data)

    def _recvmmsg(self, fd: int, messages: int, count: int, _flags: int, _timeout: int) -> int:
        received, queue = 0, self.handed if fd == HANDOFF else self.datagrams
        while received < count and queue:
            self._fill(MsgHdr.from_address(messages + 64 * received), *queue.popleft())
            received += 1
        return received if received else self._fail(libc.EAGAIN)

    @staticmethod
    def _fill(header: MsgHdr, source: tuple[str, int], data: bytes, segment: int) -> None:
        vector = IoVec.from_address(header.iov)
        assert vector.length == 65_536
        ctypes.memmove(vector.base, data, len(data))
        name = struct.pack("!H", socket_family_be()) + struct.pack("!HI", source[1], 0)
        ctypes.memmove(header.name, name + layout.packed16(ipaddress.ip_address(source[0])) + bytes(4), 28)
        header.received, header.control_length = len(data), 0
        if segment:
            ctypes.memmove(header.control, struct.pack("=Qiii", 20, 17, 104, segment), 20)
            header.control_length = 24

    def _wait(self, _epoll: int, events: int, _count: int, timeout: int) -> int:
        ready = [fd for fd, queue in ((TUN, self.tun_reads), (WIRE, self.datagrams)) if self.polls and queue]
        for place, fd in enumerate(ready):
            ctypes.memmove(events + place * state.EVENT_SIZE + state.EVENT_DATA, struct.pack("=i", fd), 4)
        if timeout and not ready:
            self._control[memory.STOP] = 1
        return len(ready)

    def _clock(self, _clock: int, address: int, _zero: int) -> int:
        self.now += self.turn_ns
        ctypes.memmove(address, struct.pack("=qq", self.now // _SECOND, self.now % _SECOND), 16)
        return 0


def socket_family_be() -> int:
    """AF_INET6 as its two bytes lie in memory, read in network order."""
    return int.from_bytes((10).to_bytes(2, "little"), "big")


class CompiledPath:
    """One worker of a node that knows a world. Flow state is kept from call to call."""

    def __init__(
        self, world: World, *, rr_start: int = 0, flows: int = 256, sources: tuple[int, ...] = (), **settings: Any
    ) -> None:
        self.world = world
        self._announced = np.zeros(counters.WORDS, np.int64)
        self._announced[counters.ANNOUNCED] = publish.ASLEEP
        announced = self._announced  # not self: the publisher's end must not wait for the collector of cycles
        self.publisher = publish.Publisher(CAPACITY, lambda: [int(announced[counters.ANNOUNCED])])
        weakref.finalize(self, self.publisher.close)
        ranges = ([ipaddress.ip_network(r) for r in kind] for kind in (world.service_ranges, world.overlay))
        self.publisher.set_ranges(*ranges)
        self.publisher.set_gateways(ipaddress.ip_address(address) for address in world.gateways)
        self.catalogue = catalogue.Catalogue(self.publisher)
        self.learn(world)
        self._control = np.zeros(memory.CONTROL_COUNT, np.int64)
        self.calls = SystemCalls(self._control)
        descriptor = self.publisher.descriptor()
        tables = read.attach(descriptor, CAPACITY)
        os.close(descriptor)
        self.records = np.zeros(flows, flow.FLOW)
        self.reports = np.zeros(misses.RING_WORDS, np.int64)
        self.worker = state.make(
            state.Settings(
                port=world.port, system_calls=self.calls.table, learn=source.MODES[world.learn_hosts], **settings
            ),
            state.Descriptors(TUN, WIRE, HANDOFF, EPOLL, sources, FRAGMENTING),
            tables,
            self.records,
            self._announced,
            self._control,
            self.reports,
        )
        self.worker.positions[:] = rr_start

    def learn(self, world: World) -> None:
        """Make a world's hosts and services the content of the tables."""
        hosts = [
            catalogue.Host(
                ipaddress.ip_address(h.address),
                ipaddress.ip_address(h.node),
                h.port,
                ipaddress.ip_address(h.instance_ip) if h.instance_ip else None,
                (h.node, h.port) == (world.node, world.port),
                h.address,
            )
            for h in world.hosts
        ]
        services = [
            catalogue.Service(
                ipaddress.ip_address(s.address),
                s.policy,
                tuple(ipaddress.ip_address(b) for b in s.backends),
                tuple(s.weights),
                near=s.near,
                sticky=s.sticky,
                hash_port=s.hash_port,
            )
            for s in world.services
        ]
        nodes = {h.node: h.port for h in world.hosts} | {n.address: n.port for n in world.nodes}
        ours = {n.address: n for n in world.nodes}
        self.catalogue.replace_nodes(
            catalogue.Node(ipaddress.ip_address(a), port, ours[a].mtu if a in ours else 0, a in ours)
            for a, port in nodes.items()
            if a != world.node
        )
        self.catalogue.replace(hosts, services)

    def refuse(self, address: str) -> None:
        """Say, as the supervisor does, that nobody has an address."""
        reports.refuse(self._control, ipaddress.ip_address(address))

    def later(self, seconds: float) -> None:
        """Let so much time pass."""
        self.calls.now += round(seconds * _SECOND)

    def from_tun(self, vnet: bytes, packet: bytes) -> Outcome:
        """What the worker does with one read from the TUN."""
        self.calls.tun_reads.append(vnet + packet)
        return self.run()

    def from_wire(self, source: tuple[str, int], payload: bytes, segment: int = 0) -> Outcome:
        """What the worker does with one datagram, or one train of segments."""
        self.calls.datagrams.append((source, payload, segment))
        return self.run()

    def run(self, *, by_stage: bool = False) -> Outcome:
        """Let the worker run until it would sleep; gives what came out. ``by_stage``: called from Python."""
        before = self._drops()
        self.calls.sent, self.calls.written = [], []
        self._control[memory.STOP] = 0
        self._control[memory.STAGED] = by_stage
        staged.forward(self.worker.record, self._control)
        after = self._drops()
        return Outcome(
            wire=[(ip, port, data) for _, ip, port, datagram, size in self.calls.sent for data in cut(datagram, size)],
            tun=[(data[:10], data[10:]) for data in self.calls.written],
            drops={reason: after[reason] - before[reason] for reason in after if after[reason] > before[reason]},
        )

    def count(self, which: counters.Count) -> int:
        """A counter of the worker."""
        return int(self._announced[counters.COUNTS + which])

    def _drops(self) -> dict[str, int]:
        words = self._announced
        return {r.label: int(words[counters.FROM_TUN + r] + words[counters.FROM_WIRE + r]) for r in Drop if r}


def cut(datagram: bytes, size: int) -> list[bytes]:
    """The datagrams that the kernel makes of one send."""
    step = size or max(1, len(datagram))
    return [datagram[at : at + step] for at in range(0, len(datagram), step)]
