"""What a packet costs two real nodes, kernel included, by how many flows are live; and what a second worker adds.

UDP packets of 64 bytes of payload, a flow's each, in random turns, as fast as one core sends them; a worker's cost is
its user and system time (/proc) over the packets that it counted. First from a container through both nodes, a worker
each: the numbers of flows in turn, round after round, ratios inside a round. Then as trains from a process beside a
node, which is cheap enough to load the workers of the other node: with one worker, and with two.

The model is `packet + call / packets a call`: least squares over the samples whose flows fit the caches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from appliance.config import Config
from appliance.lab import lifecycle
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import WEB_V4, Node
from appliance.lab.processes import inside
from perf import meter, net, run
from perf.load import crowd
from perf.load.tool import Tool, end
from perf.results import Plan, spread
from perf.study import Curve, Figure, Study, study
from perf.systems.appliance import reconfigure
from perf.topology import CLIENT_NODE, SERVER_NODE

FLOWS: Final = (1, 10, 64, 1_000, 100_000)
FEW, MANY, TOGETHER = 10, 100_000, 64
"""Flows: what MANY are compared with, and what the workers of one node share."""
CACHED: Final = 1_000
"""Flows that fit the caches: what the model is made of."""
SETTINGS: Final = ("workers.flows=131072", "workers.count=1")
WORKERS: Final = (1, 2)
SETTLE_S = 0.1
"""After the last packet was sent, until it was handled and counted."""
DROP = f"""
table inet perf-flows {{
    chain arriving {{
        type filter hook prerouting priority raw
        udp dport {crowd.FIRST_DESTINATION}-{crowd.LAST_DESTINATION} drop
    }}
}}
"""
"""Rules for nft(8) in the receiving container: nobody listens there, and nobody shall be told so."""


@dataclass(frozen=True)
class Side:
    """What the workers of one node did in a sample: processor µs a packet, packets a system call, each one's share."""

    cost: float
    batch: float
    packets: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Sample:
    """One load: seconds, what the sending node did (nothing, if it was a process beside it) and the receiving one."""

    seconds: float
    out: Side | None
    back: Side
    machine: float
    """Processor seconds of everything, the generator too."""

    @property
    def kpps(self) -> float:
        """Packets that arrived, thousands a second."""
        return self.back.packets / self.seconds / 1e3


class Reading:
    """Counters and times of a node's workers at a moment. Raises ApiError, OSError."""

    def __init__(self, lab: Lab, node: Node) -> None:
        workers = lab.api(node).status()["workers"]
        self._counters: list[dict[str, int]] = [it["counters"] for it in workers]
        self._cpu = meter.processor_s([it["pid"] for it in workers])

    def since(self, before: Reading, side: str) -> Side:
        """What was done since another moment on one side, `TUN` or `WIRE`, and how. Raises NetError."""
        came, moved, calls = COUNTED[side]
        each, called, went = self._more(before, came), self._more(before, calls), self._more(before, moved)
        if not sum(each) or not sum(called):
            raise net.NetError(f"expected packets, got {sum(each)} in {sum(called)} calls")
        cost = (self._cpu - before._cpu) / sum(each) * 1e6
        return Side(cost, sum(went) / sum(called), sum(each), tuple(it / sum(each) for it in each))

    def _more(self, before: Reading, counter: str) -> list[int]:
        return [it[counter] - was[counter] for it, was in zip(self._counters, before._counters, strict=True)]


COUNTED: Final = {
    "out": ("tun_packets", "sent_packets", "sent_calls"),
    "back": ("wire_packets", "wire_packets", "wire_reads"),
}
"""Counters of each side: packets that came, packets that a system call moved, and how many such calls there were."""


def of_container(lab: Lab, flows: int, seconds: float) -> Sample:
    """A load from a container through both nodes. Raises NetError, ToolError, ApiError."""
    client = lab.plan.client(CLIENT_NODE.number).namespace
    return _sample(lab, end(client, "crowd-container", str(WEB_V4), f"{flows}", f"{seconds}"), seconds, through=True)


def of_node(lab: Lab, flows: int, seconds: float) -> Sample:
    """A load on the receiving node alone, from beside the other one. Raises NetError, ToolError, ApiError."""
    sender, receiver = (_attached(lab, it) for it in (CLIENT_NODE, SERVER_NODE))
    to = (str(SERVER_NODE.underlay_v4), f"{Config().tunnel.port}", sender, receiver, f"{flows}", f"{seconds}")
    return _sample(lab, end(CLIENT_NODE.namespace, "crowd-node", *to), seconds, through=False)


def _attached(lab: Lab, node: Node) -> str:
    """The address of a node's container."""
    return str(lab.api(node).attachments()[0]["address_v4"])


def _sample(lab: Lab, tool: Tool, seconds: float, *, through: bool) -> Sample:
    with tool as source:
        source.expect(b"ready")
        out, back = Reading(lab, CLIENT_NODE), Reading(lab, SERVER_NODE)
        with meter.metered(()) as used:
            sent = source.go().result(seconds)
    time.sleep(SETTLE_S)
    return Sample(
        sent["seconds"],
        Reading(lab, CLIENT_NODE).since(out, "out") if through else None,
        Reading(lab, SERVER_NODE).since(back, "back"),
        used.machine,
    )


def measure(rounds: int, seconds: int, report: run.Report) -> Study:
    """All of it. Raises NetError, ToolError, LabError, ApiError."""
    plan = Plan(systems=("appliance",), scenarios=(), repeats=rounds, seconds=seconds, settings=SETTINGS)
    crowds: dict[int, list[Sample]] = {flows: [] for flows in FLOWS}
    shared: dict[int, list[Sample]] = {count: [] for count in WORKERS}
    with run.session(plan, report):
        lab = lifecycle.opened(net.LAB)
        (server,) = lab.plan.web
        net.run(*inside(server.namespace, ["nft", "-f", "-"]), stdin=DROP)
        for count in WORKERS:
            reconfigure((f"workers.count={count}",) if count > 1 else ())
            for _ in range(rounds):
                for flows in FLOWS if count == 1 else ():
                    crowds[flows].append(of_container(lab, flows, seconds))
                    report(f"{flows} flows: {crowds[flows][-1]}")
                shared[count].append(of_node(lab, TOGETHER, seconds))
                report(f"{count} workers: {shared[count][-1]}")
    facts = {**_costs(crowds), **_model(crowds), **_workers(shared)}
    return study("flows", __doc__ or "", facts, *_figures(crowds))


def _costs(crowds: dict[int, list[Sample]]) -> dict[str, str]:
    """Medians of each number of flows, and what MANY are beside FEW in the same round."""
    facts = {}
    for flows, samples in crowds.items():
        outs = [it.out for it in samples if it.out]
        backs = [it.back for it in samples]
        facts[f"{flows:,} live flows: out, in, CPU µs a packet"] = f"{_cost(outs):.2f}, {_cost(backs):.2f}"
        facts[f"· {flows:,}: packets a send, a read"] = f"{_batch(outs):.2f}, {_batch(backs):.2f}"
        facts[f"· {flows:,}: received, kpps"] = f"{median(it.kpps for it in samples):.0f}"
    pairs = list(zip(crowds[FEW], crowds[MANY], strict=True))
    ratios = {
        "out, CPU": [many.out.cost / few.out.cost for few, many in pairs if few.out and many.out],
        "in, CPU": [many.back.cost / few.back.cost for few, many in pairs],
        "received": [many.kpps / few.kpps for few, many in pairs],
    }
    what = f"{MANY:,} live flows against {FEW}"
    return facts | {f"{what}: {side} (least–most)": _ratio(values) for side, values in ratios.items()}


def _ratio(values: list[float]) -> str:
    found = spread(values)
    assert found is not None
    return f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})"


def _cost(sides: list[Side]) -> float:
    return median(it.cost for it in sides)


def _batch(sides: list[Side]) -> float:
    return median(it.batch for it in sides)


def fitted(sides: list[Side]) -> tuple[float, float]:
    """The model's terms, µs: a packet, a system call of a batch."""
    calls = np.array([[1.0, 1 / it.batch] for it in sides])
    (packet, call), *_ = np.linalg.lstsq(calls, np.array([it.cost for it in sides]))
    return float(packet), float(call)


def _model(crowds: dict[int, list[Sample]]) -> dict[str, str]:
    """The terms of each direction, and what is left of MANY flows: their cache misses."""
    cached = [it for flows, samples in crowds.items() if flows <= CACHED for it in samples]
    facts = {}
    for side, few, many in (
        ("out", [it.out for it in cached if it.out], [it.out for it in crowds[MANY] if it.out]),
        ("in", [it.back for it in cached], [it.back for it in crowds[MANY]]),
    ):
        packet, call = fitted(few)
        facts[f"model, {side}: a packet, a call, µs"] = f"{packet:.2f}, {call:.2f}"
        misses = median(it.cost - packet - call / it.batch for it in many)
        facts[f"model, {side}: misses of {MANY:,} flows, µs a packet"] = f"{misses:.2f}"
    return facts


def _workers(shared: dict[int, list[Sample]]) -> dict[str, str]:
    """What a node takes from another one with one worker, and with two."""
    facts = {}
    for count, samples in shared.items():
        what = f"{TOGETHER} flows from another node, {count} worker{'s' * (count > 1)}"
        shares = np.median([sorted(it.back.shares, reverse=True) for it in samples], axis=0)
        facts[f"{what}: received, kpps"] = f"{median(it.kpps for it in samples):.0f}"
        machine = median(it.machine / it.back.packets * 1e6 for it in samples)
        cost = _cost([it.back for it in samples])
        facts[f"· {what}: CPU µs a packet; of the whole machine, generator included"] = f"{cost:.2f}; {machine:.2f}"
        facts[f"· {what}: each one's part of the packets"] = ", ".join(f"{100 * it:.0f} %" for it in shares)
    one, two = (shared[count] for count in WORKERS)
    ratios = [more.kpps / less.kpps for less, more in zip(one, two, strict=True)]
    return facts | {"the second worker: received against one (least–most)": _ratio(ratios)}


def _figures(crowds: dict[int, list[Sample]]) -> tuple[Figure, ...]:
    out = tuple((float(flows), _cost([it.out for it in samples if it.out])) for flows, samples in crowds.items())
    back = tuple((float(flows), _cost([it.back for it in samples])) for flows, samples in crowds.items())
    title = "Two nodes, kernel included: cost of a small packet against live flows"
    curves = (Curve(name="from a container", points=out), Curve(name="from another node", points=back))
    return (Figure(key="flows", title=title, x="live flows", y="CPU µs a packet", log_x=True, curves=curves),)
