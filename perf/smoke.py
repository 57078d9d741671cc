"""The guard: has the appliance lost speed against VXLAN since the baseline was recorded?

Ratios to VXLAN of the same run, taken pair by pair, travel from machine to machine far better than times do; so the
baseline file has ratios. A metric that lost more than LOSS of its ratio is measured again, with everything built
anew, TRIES times in all: a machine that was disturbed for some seconds gets another chance, code that is slower does
not pass three times.

Every hop of the appliance is a process that must be given a CPU; VXLAN is nobody. So on a machine that does something
else the ratio says more about the scheduler than about the code, and no number of tries helps: new connections, 0.47 of
VXLAN's, were 0.1 beside four busy processes. So a try waits for a quiet machine, and is not made without; and it counts
against the code only if the machine is quiet after it too. What was lost in less than CONVICTED such tries, and held in
none, is undecided: that is said aloud and is no failure. Where the machine is not ours to keep quiet, a guard that
cries wolf is soon switched off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
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
CONVICTED: Final = 2
"""Quiet tries in which a scenario must have lost."""
BUSY_PERCENT: Final = 10
"""Of the processor time of a machine that is quiet: an idle one with a test runner's remains has up to 3."""
PATIENCE_S: Final = 20
"""How long a try waits for a quiet machine."""
REPEATS, SECONDS = 2, 1
FILE: Final = Path(__file__).with_name("baseline.json")

Measure = Callable[[Plan], Result]
Say = Callable[[str], None]
Busy = Callable[[], float]
"""How busy the machine is, in percent; takes a second to find out."""


class Verdict(Enum):
    """What the guard found."""

    HELD = "held"
    LOST = "lost"
    UNDECIDED = "undecided: the machine was busy"


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


def guard(baseline: Baseline, measure: Measure, say: Say, busy: Busy = lambda: 0.0) -> Verdict:
    """Whether every guarded scenario held its ratio in one of the tries."""
    left: tuple[str, ...] = GUARDED
    lost = Counter[str]()
    for number in range(TRIES):
        if not _quiet(busy):
            say(f"try {number + 1}: not made, the machine is busy")
            continue
        result = measure(Plan(systems=(BASELINE, SYSTEM), scenarios=left, repeats=REPEATS, seconds=SECONDS))
        quiet = busy() <= BUSY_PERCENT
        judged = [judge(name, baseline.ratios[name], ratio(result, name)) for name in left]
        for it in judged:
            say(f"try {number + 1}: {it}{'' if quiet else ', but the machine was busy'}")
        left = tuple(it.name for it in judged if not it.held)
        lost.update(left if quiet else ())
        if not left:
            return Verdict.HELD
    return Verdict.LOST if any(lost[name] >= CONVICTED for name in left) else Verdict.UNDECIDED


def _quiet(busy: Busy) -> bool:
    """Waits for a quiet machine, not for ever; whether it is."""
    return any(busy() <= BUSY_PERCENT for _ in range(PATIENCE_S))
