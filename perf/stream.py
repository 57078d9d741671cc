"""What a TCP stream makes two real nodes do: system calls, sleeps and processor time a gigabyte, and what the time goes
into.

One stream at a time, for as long as asked, from a container of one node to one of the other. All counts are those of
all workers of a node, over the 10⁹ bytes that the receiver got; the parts are of the stages that the workers themselves
time (`dataplane.stages`), of the time in which they were not asleep."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

from appliance.lab import lifecycle
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import Node
from perf import meter, net, run
from perf.load import iperf
from perf.results import Plan
from perf.study import Study, study
from perf.topology import CLIENT_NODE, SERVER_NODE

NODES: Final = (("sending", CLIENT_NODE), ("receiving", SERVER_NODE))
ASLEEP: Final = "wait"
NO_STAGE: Final = ("turns", "packets", ASLEEP)
WARM_S: Final = 1
GB: Final = 1e9


class Reading:
    """Sums over a node's workers at a moment. Raises ApiError, OSError."""

    def __init__(self, lab: Lab, node: Node) -> None:
        workers = lab.api(node).status()["workers"]
        self.counts, self.stages = Counter[str](), Counter[str]()
        for it in workers:
            self.counts.update(it["counters"])
            self.stages.update(it["stages"])
        times = [_times(it["pid"]) for it in workers]
        self.user, self.system = sum(user for user, _ in times), sum(system for _, system in times)


def _times(pid: int) -> tuple[float, float]:
    """User and system seconds of a process so far. Raises FileNotFoundError."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / meter.TICKS, int(fields[12]) / meter.TICKS


def measure(seconds: int, report: run.Report) -> Study:
    """A warm-up, and then what counts. Raises NetError, ToolError, LabError, ApiError."""
    plan = Plan(systems=("appliance",), scenarios=(), repeats=1, seconds=seconds)
    with run.session(plan, report) as (_systems, paths):
        lab, path = lifecycle.opened(net.LAB), paths["appliance"]
        with iperf.server(path.server):
            iperf.streams_in_turn(path.client, path.address_v4, WARM_S, 1)
        before = [Reading(lab, node) for _, node in NODES]
        with iperf.server(path.server), meter.metered(()) as used:
            streamed = iperf.streams_in_turn(path.client, path.address_v4, seconds, 1)
        after = [Reading(lab, node) for _, node in NODES]
    gigabytes, length = streamed.octets / GB, streamed.seconds
    facts = {
        "one stream, Gbit/s": f"{8 * gigabytes / length:.2f}",
        "whole machine, CPU-s/GB; CPUs in use": f"{used.machine / gigabytes:.2f}; {used.machine / length:.2f}",
    }
    for (name, _), was, now in zip(NODES, before, after, strict=True):
        facts |= {f"{name} node: {what}": value for what, value in _facts(was, now, gigabytes).items()}
    return study("stream", __doc__ or "", facts)


def _facts(was: Reading, now: Reading, gigabytes: float) -> dict[str, str]:
    counts, stages = now.counts - was.counts, now.stages - was.stages
    user, system = (now.user - was.user) / gigabytes, (now.system - was.system) / gigabytes

    def calls(which: str, octets: str) -> str:
        many = counts[which]
        return f"{many / gigabytes:,.0f}, {counts[octets] / max(1, many) / 1e3:.1f}"

    awake = sum(many for stage, many in stages.items() if stage not in NO_STAGE)
    parts = ((stage, many) for stage, many in stages.items() if stage not in NO_STAGE and many * 100 >= awake)
    return {
        "reads of the TUN a GB, kB each": calls("tun_reads", "tun_bytes"),
        "sends a GB, kB each": calls("sent_calls", "sent_bytes"),
        "messages received a GB, kB each": calls("wire_reads", "wire_bytes"),
        "writes into the TUN a GB, kB each": calls("written_calls", "written_bytes"),
        "sleeps a GB": f"{counts['waits'] / gigabytes:,.0f}",
        "user, system, CPU-s/GB": f"{user:.2f}, {system:.2f}",
        "time awake": ", ".join(f"{stage} {100 * many / awake:.0f} %" for stage, many in parts),
    }
