"""What the appliance must reach, and whether a result shows it."""

from dataclasses import dataclass
from typing import Literal

from perf.results import BASELINE, Result, Spread

SYSTEM = "appliance"
"""The system that is held to the thresholds."""


@dataclass(frozen=True)
class Threshold:
    """A bound on the median of a metric, or of its ratio to the baseline."""

    scenario: str
    metric: str
    kind: Literal["ratio", "value"]
    sense: Literal["at least", "at most"]
    bound: float
    what: str

    @property
    def sentence(self) -> str:
        """The expectation in words."""
        unit = f" of {BASELINE}" if self.kind == "ratio" else ""
        return f"{self.what}: {self.sense} {self.bound:g}{unit}"

    def judge(self, result: Result) -> "Verdict":
        """Holds a result against the bound; one without the measurement does not meet it."""
        find = result.ratio if self.kind == "ratio" else result.spread
        value = find(self.scenario, SYSTEM, self.metric)
        if value is None:
            return Verdict(self, None, met=False)
        met = value.median >= self.bound if self.sense == "at least" else value.median <= self.bound
        return Verdict(self, value, met=met)


@dataclass(frozen=True)
class Verdict:
    """A threshold, what was measured, and whether that is enough."""

    threshold: Threshold
    value: Spread | None
    met: bool


THRESHOLDS = (
    Threshold("tcp1", "gbit_s", "ratio", "at least", 0.65, "one TCP stream"),
    Threshold("tcp4", "gbit_s", "ratio", "at least", 0.4, "four TCP streams"),
    Threshold("tcp1-plain", "gbit_s", "ratio", "at least", 1.0, "one TCP stream, container's offloads off"),
    Threshold("tcp1-plain-gro", "gbit_s", "ratio", "at least", 0.5, "the same, GRO on both systems' ports"),
    Threshold("tcp1-cut", "gbit_s", "ratio", "at least", 0.85, "one TCP stream, underlay cuts"),
    Threshold("rr", "p50_us", "ratio", "at most", 1.35, "request and response, median"),
    Threshold("udp64", "received_kpps", "ratio", "at least", 0.8, "small UDP packets received"),
    Threshold("udp64-flows", "received_kpps", "ratio", "at least", 0.8, "small UDP packets of 64 flows received"),
    Threshold("tcp1", "worker_cpu_s_gb", "value", "at most", 1.3, "CPU-seconds per GB, workers of both nodes"),
)
"""What is promised; without the promise of busy polling, which is a mode of its own."""


def judge(result: Result) -> list[Verdict]:
    """All verdicts on a result."""
    return [threshold.judge(result) for threshold in THRESHOLDS]
