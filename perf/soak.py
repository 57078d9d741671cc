"""A soak: three nodes are called in every way for a long time, while instances, services, workers and offloads change.

Every client calls the demo service (`perf.load.calls`), node 2's over IPv6. One change after the other is made
(`perf.churn`), QUIET_S apart. Each second the drops are looked at, and at the end of each pause the memory and the
descriptors of every process, and what they share. The verdict:

- memory and descriptors are flat: after the warm-up, the first half, the slope of each role's sum (the median of the
  slopes between all pairs of moments, Theil and Sen's, which no outlier moves) makes less than FLAT for each process;
- every drop has a reason that a change explains (`churn.EXPLAINED`), and happened during such a change or at most
  LATE_S after it: what grows in a pause is unexplained;
- every call that failed did so during a change that may cost it (`churn.FORGIVEN`), or was a datagram while the
  machine itself lost packets (`watch.MACHINE`), which a soak beside other work has to know.

Workers have small flow tables, FLOWS, so that all their memory is used before the measuring begins.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, Final

from appliance.lab import lifecycle
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import WEB_V4, WEB_V6, Family, Setting, Spec
from perf import churn
from perf.load.calls import Failure
from perf.load.tool import end
from perf.study import Curve, Figure, Study, study
from perf.watch import MACHINE, Growth, Memory, Watch, memory

NAME: Final = "soak"
FLOWS: Final = 8192
QUIET_S: Final = 4.0
"""Between two changes; what a change may cost must have ended LATE_S after it."""
LATE_S: Final = 3.0
FLAT: Final = {"MiB": 1.0, "descriptors": 0.5, "processes": 0.5}
"""What a process's part of a slope may make, from the end of the warm-up to the end."""
POINTS: Final = 40
"""Of a curve that is drawn."""
SHOWN: Final = 4
"""Moments of what nothing explains that a sentence repeats."""
LOGS: Final = Path(".cache/perf/soak-logs")
"""Where the logs of nodes and cluster go, those of the last soak."""
FAMILIES: Final[tuple[Family, ...]] = ("v4", "v6", "v4")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Change:
    """One change; CLOCK_MONOTONIC seconds."""

    kind: str
    what: str
    began: float
    ended: float

    def meets(self, began: float, ended: float) -> bool:
        """Whether what happened between these moments may come of it."""
        return began <= self.ended + LATE_S and ended >= self.began


@dataclass
class Seen:
    """All that was seen."""

    began: float = field(default_factory=time.monotonic)
    changes: list[Change] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    unread: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """A sentence, and whether it is true."""

    sentence: str
    true: bool


def measure(minutes: float, report: Report) -> tuple[Study, bool]:
    """A soak of so many minutes; whether all is as it should be. Raises LabError, ApiError, ToolError."""
    try:
        settings = (Setting("workers", "flows", FLOWS),)
        lab = lifecycle.up(
            Spec(name=NAME, nodes=len(FAMILIES), instances=churn.INSTANCES, workers=(2,), settings=settings), report
        )
        try:
            seen = soak(lab, 60 * minutes, report)
        finally:
            _keep_logs(lab)
    finally:
        lifecycle.down(NAME)
    checks = list(judge(seen))
    for check in checks:
        report(f"{'ok   ' if check.true else 'WRONG'} {check.sentence}")
    return _study(seen, checks), all(it.true for it in checks)


def _keep_logs(lab: Lab) -> None:
    """What happened, for whoever wants to know why."""
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    for host in lab.plan.hosts:
        shutil.copy(lab.files.log(host.name), LOGS / f"{host.name}.log")


# --- Work ---------------------------------------------------------------------------------------


def soak(lab: Lab, seconds: float, report: Report) -> Seen:
    """Calls, changes and watches; whole rounds, so that the last moment is as the first."""
    seen = Seen()
    with _called(lab, seen), Watch(lab) as watch:
        until, number = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            for kind, change in churn.KINDS.items():
                _change(lab, kind, change, number, seen, report)
            number += 1
    seen.growths, seen.unread = watch.growths, watch.unread
    return seen


def _change(lab: Lab, kind: str, change: Callable[[Lab, int], str], number: int, seen: Seen, report: Report) -> None:
    began = time.monotonic()
    what = change(lab, number)
    made = Change(kind, what, began, time.monotonic())
    seen.changes.append(made)
    time.sleep(QUIET_S)
    seen.memory.append(memory(lab))
    report(f"{began - seen.began:7.1f} s  {kind}: {what}, {made.ended - began:.1f} s")


@contextmanager
def _called(lab: Lab, seen: Seen) -> Iterator[None]:
    """Callers in the client of each node while the block runs."""
    with ExitStack() as stack:
        tools = []
        for node, family in zip(lab.plan.nodes, FAMILIES, strict=True):
            client, kept = lab.plan.client(node.number).namespace, _elsewhere(lab, node.number, family)
            service = str(WEB_V4 if family == "v4" else WEB_V6)
            tools.append(stack.enter_context(end(client, "callers", service, kept, lab=NAME)).expect(b"ready"))
        yield
        for tool in tools:
            found = tool.result(0)
            seen.calls.update(found["calls"])
            seen.failures += [Failure(**it) for it in found["failures"]]


def _elsewhere(lab: Lab, number: int, family: Family) -> str:
    """The instance IP of an instance that stays, on another node than this one."""
    web = next(it for it in lab.plan.web[:2] if it.node.number != number)
    placed = lab.manager.picture().placed(web)
    return str(placed.instance_v4 if family == "v4" else placed.instance_v6)


# --- Verdict ------------------------------------------------------------------------------------


def judge(seen: Seen) -> Iterator[Check]:
    """What must be true of a soak."""
    measured = seen.memory[len(seen.memory) // 2 :]
    for what, series in (("MiB", "mib"), ("descriptors", "descriptors"), ("processes", "processes")):
        for role in sorted({role for it in measured for role in getattr(it, series)}):
            processes = max(1, max(it.processes.get(role, 0) for it in measured))
            yield flat(role, what, [(it.at, float(getattr(it, series).get(role, 0))) for it in measured], processes)
    yield from _drops(seen)
    yield from _calls(seen)


def flat(role: str, what: str, points: Sequence[tuple[float, float]], processes: int) -> Check:
    """Whether a series of so many processes does not rise: by its slope, over its length, less than FLAT for each."""
    usual, rise = median(it for _, it in points), slope(points) * (points[-1][0] - points[0][0])
    return Check(f"{role}: {what} {usual:.4g}, by its slope {rise:+.2f}", rise < FLAT[what] * processes)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Theil and Sen's: the median of the slopes between all pairs of points; 0 for fewer than two."""
    slopes = [(y - b) / (x - a) for (a, b), (x, y) in combinations(points, 2) if x > a]
    return median(slopes) if slopes else 0.0


def _drops(seen: Seen) -> Iterator[Check]:
    for key in sorted({(it.direction, it.reason) for it in seen.growths} - {MACHINE}):
        grown = [it for it in seen.growths if (it.direction, it.reason) == key]
        kinds, why = churn.EXPLAINED.get(key, ((), "nothing explains it"))
        bare = [it for it in grown if not _comes_of(seen.changes, kinds, it.began, it.ended)]
        sentence = f"dropped, {' '.join(key)}: {sum(it.packets for it in grown):,} packets ({why})"
        if bare:
            sentence += f"; unexplained: {sum(it.packets for it in bare):,}, {_when(seen, bare)}"
        yield Check(sentence, not bare)
    yield Check(f"moments whose drops could not be read: {seen.unread}", seen.unread == 0)


def _calls(seen: Seen) -> Iterator[Check]:
    for kind, calls in sorted(seen.calls.items()):
        failed = [it for it in seen.failures if it.kind == kind]
        bare = [it for it in failed if not _is_forgiven(seen, it)]
        sentence = f"calls, {kind}: {calls:,}, of which {len(failed)} failed"
        if bare:
            sentence += f"; not forgiven: {len(bare)}, {_when(seen, bare)}, as {bare[0].why!r}"
        yield Check(sentence, not bare)


def _is_forgiven(seen: Seen, failure: Failure) -> bool:
    if _comes_of(seen.changes, churn.FORGIVEN.get(failure.kind, ()), failure.began, failure.ended):
        return True
    losses = (it for it in seen.growths if (it.direction, it.reason) == MACHINE)
    return failure.kind in churn.UNRELIABLE and any(
        it.began <= failure.ended and it.ended >= failure.began for it in losses
    )


def _when(seen: Seen, bare: Iterable[Growth | Failure]) -> str:
    """The first moments, and what changed then."""
    moments = []
    for one in list(bare)[:SHOWN]:
        kinds = [it.kind for it in seen.changes if it.meets(one.began, one.ended)]
        moments.append(f"{one.began - seen.began:.1f} s ({', '.join(kinds) or 'no change'})")
    return "at " + ", ".join(moments)


def _comes_of(changes: Iterable[Change], kinds: Sequence[str], began: float, ended: float) -> bool:
    return any(it.kind in kinds and it.meets(began, ended) for it in changes)


# --- Result -------------------------------------------------------------------------------------


def _study(seen: Seen, checks: Sequence[Check]) -> Study:
    times = Counter(it.kind for it in seen.changes)
    facts: dict[str, str] = {"minutes": f"{(time.monotonic() - seen.began) / 60:.1f}"}
    facts |= {f"changes: {kind}": str(count) for kind, count in times.items()}
    lost = sum(it.packets for it in seen.growths if (it.direction, it.reason) == MACHINE)
    facts["packets that the machine's CPUs lost between links, whoever's"] = f"{lost:,}"
    facts |= {check.sentence: "yes" if check.true else "NO" for check in checks}
    return study("soak", __doc__ or "", facts, _figure(seen, "mib", "MiB"), _figure(seen, "descriptors", "descriptors"))


def _figure(seen: Seen, series: str, unit: str) -> Figure:
    roles = sorted({role for it in seen.memory for role in getattr(it, series)})
    curves = tuple(Curve(name=role, points=tuple(_points(seen, series, role))) for role in roles)
    return Figure(key=f"soak-{series}", title=f"A soak: {unit} by role, all nodes", x="minutes", y=unit, curves=curves)


def _points(seen: Seen, series: str, role: str) -> Iterator[tuple[float, float]]:
    for it in seen.memory[:: max(1, len(seen.memory) // POINTS)]:
        values: Any = getattr(it, series)
        yield round((it.at - seen.began) / 60, 3), round(float(values.get(role, 0)), 2)
