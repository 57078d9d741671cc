"""A mouse beside an elephant: requests and responses of one byte over TCP, alone, and beside a bulk stream that the
same worker carries.

One worker a node, so that both flows are in the same one. Alone and beside take turns, on each system in turn; what the
elephant adds to VXLAN's 99 % is what two busy CPUs add, and the rest of the appliance's is its own: a worker takes at
most one batch of the one side before the other gets its turn (``limits.TUN_BATCH``, ``WIRE_BATCH``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from perf import run, scenarios
from perf.load import iperf, ports
from perf.load.tool import Tool
from perf.results import Plan
from perf.study import Study, study
from perf.topology import Path

ALONE = "alone"
RANKS = ("p50", "p99")
SETTLE_S = 1


def measure(plan: Plan, rates: tuple[str, ...], report: run.Report) -> Study:
    """Rounds of alone, and beside a stream of each rate (as iperf3 writes them; 0: as fast as it goes)."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with run.session(plan, report) as (systems, paths):
        for _ in range(plan.repeats):
            for load in (ALONE, *rates):
                for system in systems:
                    with system.active():
                        values = _sample(paths[system.name], plan.seconds, load)
                    report(f"{system.name}, {load}: median {values['p50_us']:.0f} µs, 99 % {values['p99_us']:.0f} µs")
                    found.setdefault((system.name, load), []).append(values)
    facts = {}
    for (name, load), samples in found.items():
        times = ", ".join(f"{median(it[f'{rank}_us'] for it in samples):.0f}" for rank in RANKS)
        facts[f"{name}, {_words(load)}: 50, 99 %, µs"] = times
    return study("mice", __doc__ or "", facts)


def _words(load: str) -> str:
    return {ALONE: ALONE, "0": "beside a stream as fast as it goes"}.get(load, f"beside a stream of {load}bit/s")


def _sample(path: Path, seconds: int, load: str) -> dict[str, float]:
    if load == ALONE:
        return scenarios.request_response(path, [], seconds)
    with iperf.server(path.server), _stream(path, seconds + 2 * SETTLE_S, load):
        return scenarios.request_response(path, [], seconds)


@contextmanager
def _stream(path: Path, seconds: int, rate: str) -> Iterator[None]:
    """A stream that has begun, and lasts longer than the block. Raises ToolError if it failed."""
    argv = ("iperf3", "-c", path.address_v4, "-p", str(ports.IPERF), "-t", f"{seconds}", "-b", rate, "-J")
    with Tool(path.client, *argv) as client:
        yield
        iperf.parsed(client.result(seconds))
