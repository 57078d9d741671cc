"""The process that answers one question of ``trace``, and ends.

Theory of operation
-------------------
The compiled packet path takes a second to load, which must not stop the supervisor's event loop, and its memory is not
worth keeping for a question a week: so the supervisor starts ``python -m appliance.observe.tracer``, with read-only
descriptors of what a trace reads, and a small segment in which it announces itself as a reader of the tables. The
question comes on standard input, the answer goes to standard output. Nothing that it does outlives it.
"""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import dataclass
from typing import Any

from appliance.observe.packets import IPAddress
from appliance.tables.catalogue import Host, Service
from appliance.tables.layout import Capacity, IPNetwork


@dataclass(frozen=True)
class Job:
    """A question with all that its answer needs; descriptors are those that the process inherited."""

    packet: bytes
    sender: tuple[IPAddress, int] | None
    refused: bool
    tables: int
    records: tuple[int, ...]
    sticky: int
    counters: int
    capacity: Capacity
    flows: int
    hosts: dict[IPAddress, Host]
    services: dict[IPAddress, Service]
    ranges: tuple[IPNetwork, ...]
    port: int
    seed: int
    learn: int

    def descriptors(self) -> tuple[int, ...]:
        """What the process has to inherit."""
        return (self.tables, *self.records, self.sticky, self.counters)


def answer(job: Job) -> dict[str, Any]:
    """The answer, as the local API has it."""
    import time

    from appliance.dataplane import flow, state
    from appliance.dataplane.balance import sticky
    from appliance.observe import counters
    from appliance.observe.trace import Node, Question, trace
    from appliance.tables import read, segment

    sections: list[segment.Section] = [("records", flow.FLOW, job.flows)]
    node = Node(
        read.attach(job.tables, job.capacity),
        job.hosts,
        job.services,
        job.ranges,
        [segment.arrays(fd, sections, writable=False)["records"] for fd in job.records],
        segment.arrays(job.sticky, sticky.SECTIONS, writable=False)["sticky"],
        state.Settings(port=job.port, seed=job.seed, learn=job.learn),
        segment.arrays(job.counters, counters.SECTIONS, writable=True)["counters"],
    )
    return trace(node, Question(job.packet, job.sender, job.refused, time.monotonic_ns())).reply()


def main() -> None:
    """One question on standard input, one answer on standard output."""
    job = pickle.load(sys.stdin.buffer)  # our own supervisor's
    assert isinstance(job, Job)
    json.dump(answer(job), sys.stdout)


if __name__ == "__main__":
    from appliance.observe import tracer

    tracer.main()  # as the module that the supervisor pickled for
