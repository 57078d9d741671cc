"""The generators against themselves over loopback, and against iperf3 and sockperf on direct routing: within TOLERANCE?

Each pair measures the same thing at the same load: what one tool says divided by what the other says. They take
turns, ROUNDS times, and the median of the ratios counts, as everywhere here. sockperf's ends run on the CPUs that
ours run on. Its sender under load never sleeps and sends at even gaps, so ours does the same there; with its usual
load, exponential gaps and sleep between them, it measures something else."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Final

from perf import net, run, scenarios
from perf.load import ports, udp
from perf.load.iperf import server as iperf_server
from perf.load.tool import Tool, ToolError
from perf.results import Plan
from perf.study import Study, study
from perf.topology import Path

TOLERANCE: Final = 0.10
ROUNDS: Final = 5
RATE: Final = 20_000
"""Packets a second that both generators offer: iperf3 makes a system call a packet, and keeps up with this."""
SECONDS: Final = 2
MESSAGE: Final = 14
"""Bytes of sockperf's smallest message; our exchange has one byte, which is a packet as small."""


@dataclass(frozen=True)
class Pair:
    """Two measurements of one thing."""

    what: str
    unit: str
    ours: Callable[[], float]
    theirs: Callable[[], float]

    def compare(self) -> tuple[float, float, float]:
        """Medians of both, and of the ratios."""
        found = [(self.ours(), self.theirs()) for _ in range(ROUNDS)]
        ours, theirs = zip(*found, strict=True)
        return median(ours), median(theirs), median(a / b for a, b in found)


def loopback() -> Pair:
    """What the generator says it sent, and what the sink says that came."""
    sent = []

    def ours() -> float:
        with udp.sink(0) as sink:
            found: list[udp.Received] = []
            thread = threading.Thread(target=lambda: found.append(udp.count(sink)))
            thread.start()
            with udp.Generator("127.0.0.1", sink.getsockname()[1], 8) as source:
                sent.append(source.generate(64, SECONDS, RATE))
            thread.join()
        return found[0].packets / found[0].seconds / 1e3

    return Pair(
        "UDP over loopback: our sink, our generator", "kpps", ours, lambda: sent[-1].packets / sent[-1].seconds / 1e3
    )


def pairs(path: Path) -> Iterator[Pair]:
    """Ours and another's over a path."""
    yield Pair(
        f"UDP at {RATE:,} packets/s: ours, iperf3",
        "kpps",
        lambda: scenarios.udp(path, [], SECONDS, rate=RATE)["received_kpps"],
        lambda: _iperf_udp(path),
    )
    yield Pair(
        "TCP request and response, median: ours, sockperf ping-pong",
        "µs",
        lambda: scenarios.request_response(path, [], SECONDS)["p50_us"],
        lambda: _sockperf(path, "ping-pong", "--tcp", "-m", str(MESSAGE)),
    )
    yield Pair(
        f"UDP, {scenarios.OPEN_RATE:,} requests/s, open loop, median: ours, sockperf under-load",
        "µs",
        lambda: scenarios.open_answers(path, SECONDS, scenarios.OPEN_RATE, steady=True)["percentiles"]["p50"],
        lambda: _sockperf(path, "under-load", "-m", "64", "--mps", str(scenarios.OPEN_RATE), "--reply-every", "1"),
    )


def _iperf_udp(path: Path) -> float:
    """Packets that iperf3's server received, in thousands a second."""
    size = scenarios.UDP_PAYLOAD
    argv = ("iperf3", "-u", "-c", path.address_v4, "-p", str(ports.IPERF), "-l", str(size), "-b", str(RATE * size * 8))
    with iperf_server(path.server), Tool(path.client, *argv, "-t", str(SECONDS), "-J") as client:
        end_ = client.result(SECONDS)["end"]["sum"]
    return float((end_["packets"] - end_["lost_packets"]) / end_["seconds"] / 1e3)


def _sockperf(path: Path, load: str, *options: str) -> float:
    """The median round trip that sockperf measures, µs."""
    first, *_, last = sorted(os.sched_getaffinity(0))
    where, ends = str(first), list[str]()
    if load == "under-load":  # as ours: who sends and who receives are two threads
        where, ends = f"{first}-{last}", ["--sender-affinity", str(first), "--receiver-affinity", str(last)]
    protocol = [it for it in options if it == "--tcp"]
    listen = ("taskset", "-c", str(last), "sockperf", "server", "-p", str(ports.TCP), *protocol)
    with Tool(path.server, *listen).expect(b"Warmup"):
        argv = ("taskset", "-c", where, "sockperf", load, "-i", path.address_v4, "-p", str(ports.TCP), *options, *ends)
        said = net.run("ip", "netns", "exec", path.client, *argv, "-t", str(SECONDS), "--full-rtt")
    found = re.search(r"percentile 50\.000 =\s*([0-9.]+)", said)
    if found is None:
        raise ToolError(f"sockperf: expected a median, got {said[-500:]!r}")
    return float(found[1])


def measure(plan: Plan, report: run.Report) -> tuple[Study, bool]:
    """All pairs, and whether each agrees."""
    facts, agreed = {}, True
    with run.session(plan, report) as (_, paths):
        for pair in (loopback(), *pairs(paths["direct"])):
            ours, theirs, ratio = pair.compare()
            good = abs(ratio - 1) <= TOLERANCE
            agreed &= good
            facts[f"{pair.what}, {pair.unit}"] = (
                f"{ours:.1f}, {theirs:.1f}: {ratio:.2f} {'' if good else 'APART'}".strip()
            )
            report(f"{pair.what}: {facts[f'{pair.what}, {pair.unit}']}")
    return study("calibrate", __doc__ or "", facts), agreed
