"""The packet path without the kernel: recorded packets from memory, through the compiled stages, to nowhere.

The stages are those of a worker (`appliance.dataplane.outbound`, `inbound`), in batches, with its tables and flow
table. Only the system calls are replaced, by compiled ones: a read copies the next recorded packet, a send or write
returns. So what is measured is one core's own cost of a packet, without the kernel's and without wake-ups, which on
this path are most of it. The clock is the real one, once a batch as always.

Packets are 64 bytes of UDP in a ring of RING packets, whatever the number of flows, in a random order of flows: no
two neighbours can share a train, and every lookup meets a cache line that was last touched as long ago as the number
of flows allows. That is the worst case; a bulk flow meets its line in the first-level cache each time.

The model is `packet + batch/n + misses(flows, services)`: least squares over the batch sizes gives the first two
terms, the difference to WARM flows the third."""

from __future__ import annotations

import ipaddress
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from appliance import limits
from appliance.dataplane import flow, memory, misses, state, worker
from appliance.dataplane.wire import vnet
from appliance.observe import counters
from appliance.observe.counters import Count
from appliance.tables import layout, publish, read
from appliance.tables.catalogue import Catalogue, Host, Service
from perf import replay
from perf.replay import NAME_AT, PACKET, PAYLOAD, RING, STRIDE, system_calls
from perf.study import Curve, Figure, Study, study

LOCALS: Final = 64
"""Containers of this node."""
WARM: Final = 10
"""Flows that stay in the first-level cache: what the others are compared with."""
FLOWS: Final = (10, 100, 1_000, 10_000, 100_000)
SERVICES: Final = (10, 100, 1_000, 10_000, 50_000)
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
PORT: Final = 50103
NODE, PEERS = IPv4Address("192.0.2.1"), 200
ROUNDS: Final = 7
"""Measurements of each point; the median counts."""
Words = NDArray[np.int64]
Rows = NDArray[np.uint8]

SEED: Final = 8

# --- Recorded packets --------------------------------------------------------------------------------------------


class Ring:
    """Recorded packets end to end in memory. `head` is what the system calls get as their descriptor."""

    def __init__(self, rows: Rows) -> None:
        self._rows = np.ascontiguousarray(rows)
        self.head = np.array([self._rows.ctypes.data, 0], np.int64)

    @property
    def descriptor(self) -> int:
        """Address of the head."""
        return int(self.head.ctypes.data)


def udp(sources: Words, destinations: Words, sports: Words, dports: Words) -> Rows:
    """IPv4 packets, a row each, with valid checksums: none for UDP, which that allows (RFC 768)."""
    rows = np.zeros((len(sources), STRIDE), np.uint8)
    words = rows.view(">u2")
    words[:, :6] = (0x4500, PACKET, 1, 0x4000, 64 << 8 | 17, 0)
    words[:, 6], words[:, 7], words[:, 8], words[:, 9] = sources >> 16, sources, destinations >> 16, destinations
    words[:, 10], words[:, 11], words[:, 12] = sports, dports, 8 + PAYLOAD
    total = words[:, :10].astype(np.int64).sum(1)
    total = (total & 0xFFFF) + (total >> 16)
    words[:, 5] = 0xFFFF - ((total & 0xFFFF) + (total >> 16))
    return rows


LOCAL, REMOTE, SERVICE, PEER = (int(IPv4Address(it)) for it in ("10.18.0.2", "10.19.0.0", "10.128.0.0", "192.0.2.2"))
"""The first container of this node, instance elsewhere, ServiceIP, and other node; the next of each is one more."""
INSTANCE_IP = int(IPv4Address("10.200.0.0")) - int(IPv4Address("10.18.0.0"))
"""From a container's address to its instance IP."""


def flows_at_random(flows: int, seed: int) -> Words:
    """A flow for each packet of a ring: each one as often as any other, in no order."""
    return np.random.default_rng(seed).permutation(RING) % flows


def requests(flows: int, services: int) -> Rows:
    """Packets of containers to ServiceIPs, each behind a virtio header."""
    number = flows_at_random(flows, SEED)
    rows = udp(LOCAL + number % LOCALS, SERVICE + number % services, *_ports(number))
    return np.roll(rows, vnet.LENGTH, axis=1)


def answers(flows: int, services: int) -> Rows:
    """Datagrams with what comes back, and who sent them (struct sockaddr_in6 without its scope)."""
    number = flows_at_random(flows, SEED + 1)
    target, (sport, dport) = number % services, _ports(number)
    rows = udp(REMOTE + target + INSTANCE_IP, LOCAL + number % LOCALS, dport, sport)
    sender = rows[:, NAME_AT : NAME_AT + 24]
    sender[:, 0] = 10  # AF_INET6
    sender[:, 2:4] = np.frombuffer(PORT.to_bytes(2, "big"), np.uint8)
    sender[:, 18:20] = 0xFF  # ::ffff:192.0.2.2
    sender[:, 20:24] = (PEER + target % PEERS).astype(">u4")[:, None].view(np.uint8)
    return rows


def _ports(number: Words) -> tuple[Words, Words]:
    """Ports of a flow, such that flows of one container to one service differ."""
    return 1_024 + number // LOCALS, np.full(len(number), 80)


# --- A worker ----------------------------------------------------------------------------------------------------


def tables(services: int) -> publish.Publisher:
    """A node that knows so many services with an instance each, on PEERS other nodes."""
    size = max(1_024, 2 * (services + LOCALS))
    made = publish.Publisher(layout.Capacity(hosts=size, services=size, choices=2 * size, maglev=16))
    made.set_ranges([ipaddress.ip_network("10.128.0.0/9")], [ipaddress.ip_network("10.16.0.0/12")])
    at = IPv4Address
    hosts = [Host(at(LOCAL + it), NODE, PORT, at(LOCAL + it + INSTANCE_IP), True, f"l{it}") for it in range(LOCALS)]
    hosts += [
        Host(at(REMOTE + it), at(PEER + it % PEERS), PORT, at(REMOTE + it + INSTANCE_IP), owner=f"r{it}")
        for it in range(services)
    ]
    Catalogue(made).replace(hosts, [Service(at(SERVICE + it), "rr", (at(REMOTE + it),)) for it in range(services)])
    return made


class Replay:
    """A worker whose packets come from memory."""

    def __init__(self, known: publish.Publisher, services: int, flows: int) -> None:
        self._flows = flows
        self._out, self._in = Ring(requests(flows, services)), Ring(answers(flows, services))
        self._counters = np.zeros(counters.WORDS, np.int64)
        descriptor = known.descriptor()
        self._worker = state.make(
            state.Settings(port=PORT, system_calls=system_calls()),
            state.Descriptors(self._out.descriptor, self._in.descriptor, -1, -1),
            read.attach(descriptor, known.capacity),
            np.zeros(1 << max(10, (2 * flows - 1).bit_length()), flow.FLOW),
            self._counters,
            np.zeros(memory.CONTROL_COUNT, np.int64),
            np.zeros(misses.RING_WORDS, np.int64),
        )
        os.close(descriptor)
        replay.send(self._worker.record, 0, 1)  # compiled here, lest flows expire meanwhile
        replay.receive(self._worker.record, 0, 1)
        self._worker.control[memory.STOP] = 1
        worker.work(self._worker.record)  # takes its flow table over

    def send(self, batch: int = limits.TUN_BATCH) -> float:
        """Nanoseconds a packet from a container, over the whole ring, each flow known."""
        return self._timed(replay.send, batch)

    def receive(self, batch: int = limits.WIRE_BATCH) -> float:
        """Nanoseconds a packet from another node."""
        return self._timed(replay.receive, batch)

    def run(self, rounds: int) -> None:
        """Sends so many rings."""
        for _ in range(rounds):
            replay.send(self._worker.record, RING // limits.TUN_BATCH, limits.TUN_BATCH)

    def _timed(self, stage: Callable[[Any, int, int], None], batch: int) -> float:
        stage(self._worker.record, RING // batch, batch)  # caches and flows are as they will be
        began = time.perf_counter_ns()
        stage(self._worker.record, RING // batch, batch)
        return (time.perf_counter_ns() - began) / (RING // batch * batch)

    def check(self) -> None:
        """That every packet went the way that was meant. Raises AssertionError with the counters."""
        replay.send(self._worker.record, RING // limits.TUN_BATCH, limits.TUN_BATCH)
        replay.receive(self._worker.record, RING // limits.WIRE_BATCH, limits.WIRE_BATCH)
        drops = self._counters[counters.FROM_TUN :]
        sent = int(self._counters[counters.COUNTS + Count.SENT_PACKETS])
        written = int(self._counters[counters.COUNTS + Count.WRITTEN_PACKETS])
        live = flow.live(self._worker.record[0])
        assert (sent, written) == (RING, RING), (
            f"sent {sent}, written {written} of {RING}: { {int(i): int(drops[i]) for i in np.flatnonzero(drops)} }"
        )
        assert live <= self._flows


# --- The study ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Nanoseconds a packet, from a container and from another node."""

    out: float
    back: float


def cost(flows: int, services: int, known: publish.Publisher) -> Cost:
    """Medians of ROUNDS measurements, both directions in turn."""
    player = Replay(known, services, flows)
    player.check()
    pairs = [(player.send(), player.receive()) for _ in range(ROUNDS)]
    return Cost(median(out for out, _ in pairs), median(back for _, back in pairs))


def by_batch(player: Replay) -> tuple[list[tuple[float, float]], float, float]:
    """Cost of a packet out by the size of the batch, and its two terms in ns: a packet, a batch."""
    points = [(float(size), median(player.send(size) for _ in range(ROUNDS))) for size in BATCHES]
    sizes, costs = np.array(points).T
    (packet, batch), *_ = np.linalg.lstsq(np.stack([np.ones_like(sizes), 1 / sizes], 1), costs)
    return points, float(packet), float(batch)


def together(known: publish.Publisher, services: int, cores: int) -> float:
    """Packets a second in millions that so many workers send at a time, each with its own flows, one a core."""
    players = [Replay(known, services, 1_000) for _ in range(cores)]
    for player in players:
        player.check()
    usable = sorted(os.sched_getaffinity(0))

    def work(index: int) -> None:
        os.sched_setaffinity(threading.get_native_id(), {usable[index]})
        players[index].run(ROUNDS)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(cores)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return cores * ROUNDS * RING / (time.perf_counter() - began) / 1e6


def measure() -> Study:
    """All of it: a minute on a quiet core, and the compilation before the first."""
    known = tables(1_000)
    by_flows = {flows: cost(flows, 1_000, known) for flows in FLOWS}
    points, packet, batch = by_batch(Replay(known, 1_000, WARM))
    rates = [(float(n), together(known, 1_000, n)) for n in range(1, len(os.sched_getaffinity(0)) + 1)]
    known.close()
    by_services = {}
    for services in SERVICES:
        known = tables(services)
        by_services[services] = cost(max(services, 1_000), services, known)
        known.close()
    facts = {
        "a packet out, ns": f"{packet:.0f}",
        f"a batch out, ns (a share of 1/{limits.TUN_BATCH} at full load)": f"{batch:.0f}",
        **_facts("live flows", by_flows),
        f"{max(FLOWS):,} live flows against {WARM}: out, back, ns a packet more": _more(by_flows),
        **_facts("services, as many flows (1,000 at least)", by_services),
        **{f"{n:.0f} cores at a time, million packets/s out": f"{rate:.2f}" for n, rate in rates},
    }
    return study("path", __doc__ or "", facts, *_figures(by_flows, by_services, points, rates))


def _more(costs: dict[int, Cost]) -> str:
    """What cache misses add."""
    few, many = costs[WARM], costs[max(FLOWS)]
    return f"{many.out - few.out:.0f}, {many.back - few.back:.0f}"


def _facts(what: str, costs: dict[int, Cost]) -> dict[str, str]:
    return {f"{many:,} {what}: out, back, ns a packet": f"{it.out:.0f}, {it.back:.0f}" for many, it in costs.items()}


def _figures(
    by_flows: dict[int, Cost],
    by_services: dict[int, Cost],
    points: list[tuple[float, float]],
    rates: list[tuple[float, float]],
) -> Iterator[Figure]:
    for key, what, costs in (("flows", "live flows", by_flows), ("services", "services in the tables", by_services)):
        out = Curve(name="from a container", points=tuple((many, it.out) for many, it in costs.items()))
        back = Curve(name="from another node", points=tuple((many, it.back) for many, it in costs.items()))
        title = f"Packet path without the kernel: cost against {what}"
        yield Figure(key=f"path-{key}", title=title, x=what, y="ns a packet", log_x=True, curves=(out, back))
    curve = Curve(name="from a container", points=tuple(points))
    title = "Packet path without the kernel: cost against the batch"
    yield Figure(key="path-batch", title=title, x="packets a batch", y="ns a packet", log_x=True, curves=(curve,))
    curves = (
        Curve(name="measured", points=tuple(rates)),
        Curve(name="as many times one core", points=tuple((n, n * rates[0][1]) for n, _ in rates)),
    )
    yield Figure(
        key="path-cores",
        title="Packet path without the kernel: cores at a time",
        x="workers, one a core",
        y="million packets/s",
        curves=curves,
    )
