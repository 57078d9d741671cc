"""How long the supervisor takes from an answer of the cluster to the tables that the workers read.

One process, no packets: 10,000 services of five instances each, both families, as a large cluster's answers have
them. Everything at once (a start, another uplink), everything again without a difference (a return of the broker), and
one answer in which one instance has moved: from the bytes of the message to the published epoch, and until another
process sees that epoch in tables that it has mapped read-only, as workers have (``_watch``).
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection

import numpy as np
import orjson

from appliance.cluster.feed import Tables
from appliance.cluster.messages import TableQueryResult, parse_answer
from appliance.cluster.requests import Endpoint
from appliance.supervisor.publication import Publication
from appliance.supervisor.warm import compile_publisher
from appliance.tables import segment
from appliance.tables.catalogue import Catalogue
from appliance.tables.layout import H_EPOCH, Capacity, sections
from appliance.tables.publish import Publisher
from perf.study import Study, study

SERVICES, INSTANCES, NODES = 10_000, 5, 200
UPDATES = 1_000
CAPACITY = Capacity(hosts=131_072, services=131_072, choices=262_144)


@dataclass(frozen=True)
class Result:
    """Seconds."""

    parse: float
    first: float
    again: float
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
            "everything published into empty tables": f"{self.first:.1f} s",
            "everything once more, unchanged": f"{self.again:.2f} s",
            "everything once more, with another uplink address": f"{self.moved:.2f} s",
            "parsing all answers, which arrive one by one": f"{self.parse:.1f} s",
            "memory of that process; of which the tables": f"{self.memory_mib:.0f} MiB; {self.tables_mib:.0f} MiB",
        }
        return study("tables", __doc__ or "", facts)


def measure() -> Result:
    """All of it, once."""
    compile_publisher()
    publisher = Publisher(CAPACITY)
    publication = Publication(Catalogue(publisher), _here(1))
    messages = [answer(number) for number in range(SERVICES)]
    jobs: dict[str, TableQueryResult] = {}
    parse = _seconds(lambda: jobs.update((it.job, it) for it in map(_parse, messages)))
    everything = Tables(jobs, frozenset(jobs))
    first = _seconds(lambda: publication.update(everything))
    again = _seconds(lambda: publication.update(everything))
    moved = _seconds(lambda: publication.move(_here(2)))
    tables = publisher.descriptor()
    size = os.fstat(tables).st_size
    ours, theirs = Pipe()
    watcher = Process(target=_watch, args=(tables, publisher.epoch + UPDATES, theirs))
    watcher.start()
    ours.recv()
    began, updates = zip(*_updates(publication, jobs), strict=True)
    seen = [at - start for at, start in zip(ours.recv(), began, strict=True)]
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Result(parse, first, again, moved, list(updates), seen, peak, size / 2**20)


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


def _updates(publication: Publication, jobs: dict[str, TableQueryResult]) -> Iterator[tuple[float, float]]:
    """The first instance of one service after the other gets another address: when, and how long that took."""
    for number in range(UPDATES):
        message = answer(number * 7 % SERVICES, moved=True)
        began = time.monotonic()
        result = _parse(message)
        jobs[result.job] = result
        change = publication.update(Tables(jobs, frozenset({result.job})))
        yield began, time.monotonic() - began
        assert len(change.hosts) == len(change.hosts_removed) == 2


def answer(number: int, *, moved: bool = False) -> bytes:
    """The answer about one service."""
    instances = [_instance(number, instance, moved and instance == 0) for instance in range(INSTANCES)]
    return orjson.dumps({"app_name": f"app.ns.s{number}.test", "instance_list": instances, "query_key": ""})


def _instance(service: int, instance: int, moved: bool) -> dict[str, object]:
    number = service * INSTANCES + instance
    host = number + (SERVICES * INSTANCES if moved else 0)
    return {
        "instance_number": instance,
        "namespace_ip": str(IPv4Address("10.18.0.2") + host),
        "namespace_ip_v6": str(IPv6Address("fc00::2") + host),
        "host_ip": str(IPv4Address("192.0.2.1") + host % NODES),
        "host_port": 50103,
        "service_ip": [
            _service_ip("RR", IPv4Address("10.30.0.0") + service, IPv6Address("fdff:2000::") + service),
            _service_ip("instance_ip", IPv4Address("10.31.0.0") + number, IPv6Address("fdff::") + number),
        ],
    }


def _service_ip(kind: str, v4: IPv4Address, v6: IPv6Address) -> dict[str, str]:
    return {"IpType": kind, "Address": str(v4), "Address_v6": str(v6)}


def _parse(message: bytes) -> TableQueryResult:
    return parse_answer(TableQueryResult, message)


def _here(number: int) -> Endpoint:
    return Endpoint(IPv4Address(f"192.0.2.{number}"), 50103)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
