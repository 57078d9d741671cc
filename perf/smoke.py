"""The guard: has the appliance lost speed against VXLAN since the baseline was recorded?

Ratios to VXLAN of the same run, taken pair by pair, travel from machine to machine far better than times do; so the
baseline file has ratios. A metric that lost more than LOSS of its ratio is measured again, with everything built
anew, TRIES times in all: a machine that was disturbed for some seconds gets another chance, code that is slower does
not pass three times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from perf.compare import LESS_IS_BETTER
from perf.results import BASELINE, Plan, Result
from perf.scenarios import SCENARIOS
from perf.thresholds import SYSTEM

GUARDED: Final = ("tcp1", "udp64-flows", "rr")
"""Bulk, packets one by one, and latency: the first metric of each."""
LOSS: Final = 0.20
TRIES: Final = 3
REPEATS, SECONDS = 2, 1
FILE: Final = Path(__file__).with_name("baseline.json")

Measure = Callable[[Plan], Result]
Say = Callable[[str], None]


class Baseline(BaseModel):
    """Ratios of the appliance to VXLAN by scenario, and which run they are from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    command: str
    started: datetime
    commit: str
    ratios: dict[str, float]

    @classmethod
    def of(cls, result: Result) -> Baseline:
        """The ratios of a run. Raises ValueError if it lacks one."""
        ratios = {name: ratio(result, name) for name in GUARDED}
        missing = [name for name, value in ratios.items() if value is None]
        if missing:
            raise ValueError(f"expected {BASELINE} and {SYSTEM} with scenarios {', '.join(missing)}")
        kept = {name: round(value, 3) for name, value in ratios.items() if value is not None}
        commit = str(result.machine.get("commit", "unknown"))
        return cls(command=result.command, started=result.started, commit=commit, ratios=kept)


def ratio(result: Result, name: str) -> float | None:
    """The median ratio of a scenario's first metric; None if it could not be measured."""
    found = result.ratio(name, SYSTEM, metric_of(name)[0])
    return None if found is None else found.median


def metric_of(name: str) -> tuple[str, bool]:
    """Key of a scenario's first metric, and whether less of it is better."""
    metric = next(scenario.metrics[0] for scenario in SCENARIOS if scenario.name == name)
    return metric.key, metric.unit in LESS_IS_BETTER


@dataclass(frozen=True)
class Judged:
    """A scenario held against its baseline; `loss` is the part of its speed that it lost, None if not measured."""

    name: str
    before: float
    now: float | None
    loss: float | None

    @property
    def held(self) -> bool:
        """Whether the loss is tolerable."""
        return self.loss is not None and self.loss <= LOSS

    def __str__(self) -> str:
        if self.now is None or self.loss is None:
            return f"{self.name}: not measured"
        word = "held" if self.held else "LOST"
        return f"{self.name}: {self.now:.2f} of {BASELINE}, {self.before:.2f} before: {word} ({-self.loss:+.0%})"


def judge(name: str, before: float, now: float | None) -> Judged:
    """One ratio against the baseline's."""
    if not now:
        return Judged(name, before, None, None)
    less_is_better = metric_of(name)[1]
    return Judged(name, before, now, 1 - (before / now if less_is_better else now / before))


def guard(baseline: Baseline, measure: Measure, say: Say) -> bool:
    """Whether every guarded scenario held its ratio in one of the tries."""
    left: tuple[str, ...] = GUARDED
    for number in range(TRIES):
        plan = Plan(systems=(BASELINE, SYSTEM), scenarios=left, repeats=REPEATS, seconds=SECONDS)
        result = measure(plan)
        judged = [judge(name, baseline.ratios[name], ratio(result, name)) for name in left]
        for it in judged:
            say(f"try {number + 1}: {it}")
        left = tuple(it.name for it in judged if not it.held)
        if not left:
            return True
    return False
