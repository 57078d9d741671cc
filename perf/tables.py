"""How long the supervisor takes from an answer of the cluster to the tables that the workers read.

One process, no packets, no broker (``resync`` has one): 10,000 services of five instances each, both families, as a
large cluster's answers have them, taken by the session one by one and published together. Everything into empty tables
(a start), everything once more without a difference (a return of the broker), once more with one instance of each
service moved, and with another address of the uplink. Then one answer in which one instance has moved: from the bytes
of the message to the published epoch, and until another process sees that epoch in tables that it has mapped read-only,
as workers have (``_watch``).
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_network
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection

import numpy as np
import orjson

from appliance.cluster import topics
from appliance.cluster.checks import Ranges
from appliance.cluster.commands import Changed
from appliance.cluster.feed import Tables
from appliance.cluster.member import YOUNG_MAX
from appliance.cluster.requests import Endpoint
from appliance.cluster.session import Session, Times
from appliance.collector import Settling
from appliance.supervisor.publication import Publication
from appliance.supervisor.warm import compile_publisher
from appliance.tables import segment
from appliance.tables.catalogue import Catalogue, Change
from appliance.tables.layout import H_EPOCH, Capacity, sections
from appliance.tables.publish import Publisher
from perf.study import Study, study

SERVICES, INSTANCES, NODES = 10_000, 5, 200
UPDATES = 1_000
NODE = "0" * 24
OVERLAY, SERVICE_RANGES = ("10.16.0.0/12", "fc00::/7"), ("10.30.0.0/15", "fdff::/16")
RANGES = Ranges(tuple(map(ip_network, OVERLAY)), tuple(map(ip_network, SERVICE_RANGES)))
CAPACITY = Capacity(hosts=131_072, services=131_072, choices=262_144)


@dataclass(frozen=True)
class Took:
    """Seconds for all answers: until the session had taken them, which the event loop does one by one, and for their
    publication, during which the loop stands still."""

    taken: float
    published: float

    def __str__(self) -> str:
        return f"{self.taken:.2f} s, {self.published:.2f} s"


@dataclass(frozen=True)
class Result:
    """Seconds."""

    first: Took
    again: Took
    other: Took
    moved: float
    updates: list[float]
    seen: list[float]
    memory_mib: float
    tables_mib: float

    def study(self) -> Study:
        """What was measured, in words."""
        updates, seen = (np.percentile(times, (50, 99)) * 1e3 for times in (self.updates, self.seen))
        facts = {
            "services, instances, both families": f"{SERVICES:,}, {SERVICES * INSTANCES:,}",
            "one instance moves: from the message's bytes to the published epoch, median": f"{updates[0]:.2f} ms",
            "· 99 %": f"{updates[1]:.1f} ms",
            "· until another process sees it in its mapping, as a worker has one, median": f"{seen[0]:.2f} ms",
            "· until another process sees it, 99 %": f"{seen[1]:.1f} ms",
            "everything into empty tables: answers taken, published": str(self.first),
            "everything once more, nothing is different: answers taken, published": str(self.again),
            "everything once more, one instance of each service has moved: answers taken, published": str(self.other),
            "everything published for another uplink address": f"{self.moved:.2f} s",
            "memory of that process; of which the tables": f"{self.memory_mib:.0f} MiB; {self.tables_mib:.0f} MiB",
        }
        return study("tables", __doc__ or "", facts)


def measure() -> Result:
    """All of it, once."""
    compile_publisher()
    publisher = Publisher(CAPACITY)
    publication = Publication(Catalogue(publisher), here(1))
    node = _Node(publication)
    first, again = node.takes(moved=False), node.takes(moved=False)
    other = node.takes(moved=True)
    node.takes(moved=False)
    moved = _seconds(lambda: publication.move(here(2)))
    tables = publisher.descriptor()
    size = os.fstat(tables).st_size
    ours, theirs = Pipe()
    watcher = Process(target=_watch, args=(tables, publisher.epoch + UPDATES, theirs))
    watcher.start()
    ours.recv()
    began, updates = zip(*_updates(node), strict=True)
    seen = [at - start for at, start in zip(ours.recv(), began, strict=True)]
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Result(first, again, other, moved, list(updates), seen, peak, size / 2**20)


def _watch(tables: int, last: int, told: Connection) -> None:
    """When each epoch was seen in the mapped tables, seconds of the monotonic clock; in a process of its own."""
    header = segment.arrays(tables, sections(CAPACITY), writable=False)["header"]
    seen: list[float] = []
    epoch = int(header[H_EPOCH])
    told.send("ready")
    while epoch < last:
        now = int(header[H_EPOCH])
        if now != epoch:
            seen += [time.monotonic()] * (now - epoch)
            epoch = now
    told.send(seen)


class _Node:
    """A node's session and what becomes of its answers, without a broker between it and the cluster."""

    def __init__(self, publication: Publication) -> None:
        self._publication = publication
        self._session = Session(NODE, here(1), Times(), RANGES)
        self._settling = Settling(YOUNG_MAX)
        self._topic = topics.of_node(NODE, topics.QUERY_RESULT)
        self._session.connected(0.0)
        for number in range(SERVICES):
            self._session.need(job(number), 0.0)

    def takes(self, *, moved: bool) -> Took:
        """An answer about every service."""
        messages = [answer(number, moved=moved) for number in range(SERVICES)]
        changed: set[str] = set()
        taken = _seconds(lambda: changed.update(*map(self._take, messages)))
        return Took(taken, _seconds(lambda: changed and self._publish(changed)))

    def take(self, message: bytes) -> Change:
        """One answer, published."""
        return self._publish(self._take(message))

    def _publish(self, changed: Iterable[str]) -> Change:
        return self._publication.update(Tables(self._session.jobs, frozenset(changed)))

    def _take(self, message: bytes) -> set[str]:
        commands = self._session.received(self._topic, message, 0.0)
        changed = {job for command in commands if isinstance(command, Changed) for job in command.jobs}
        self._settling.came(len(changed))
        return changed


def _updates(node: _Node) -> Iterator[tuple[float, float]]:
    """The first instance of one service after the other gets another address: when, and how long that took."""
    for number in range(UPDATES):
        message = answer(number * 7 % SERVICES, moved=True)
        began = time.monotonic()
        change = node.take(message)
        yield began, time.monotonic() - began
        assert len(change.hosts) == len(change.hosts_removed) == 2


def job(number: int) -> str:
    """The name of a service."""
    return f"app.ns.s{number}.test"


def answer(number: int, *, moved: bool = False) -> bytes:
    """The answer about one service."""
    instances = [_instance(number, instance, moved and instance == 0) for instance in range(INSTANCES)]
    return orjson.dumps({"app_name": job(number), "instance_list": instances, "query_key": ""})


def _instance(service: int, instance: int, moved: bool) -> dict[str, object]:
    number = service * INSTANCES + instance
    host = number + (SERVICES * INSTANCES if moved else 0)
    return {
        "instance_number": instance,
        "namespace_ip": str(IPv4Address("10.18.0.2") + host),
        "namespace_ip_v6": str(IPv6Address("fc00::2") + host),
        "host_ip": str(IPv4Address("198.51.100.1") + host % NODES),
        "host_port": 50103,
        "service_ip": [
            _service_ip("RR", IPv4Address("10.30.0.0") + service, IPv6Address("fdff:2000::") + service),
            _service_ip("instance_ip", IPv4Address("10.31.0.0") + number, IPv6Address("fdff::") + number),
        ],
    }


def _service_ip(kind: str, v4: IPv4Address, v6: IPv6Address) -> dict[str, str]:
    return {"IpType": kind, "Address": str(v4), "Address_v6": str(v6)}


def here(number: int) -> Endpoint:
    """Where a node is reached."""
    return Endpoint(IPv4Address(f"192.0.2.{number}"), 50103)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
