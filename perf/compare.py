"""What differs between two results beyond noise.

Two runs are compared by the ratios to the baseline that each took inside its own repeats, so that a machine that
is slower today cancels out; a system without the baseline beside it, and the baseline itself, by its values. For
each metric:

- the change is the median of all quotients of a sample of the second run and one of the first (Hodges and Lehmann's
  estimate, of the logarithm's shift);
- its interval is what the rank-sum test of Mann and Whitney does not reject, exact for these small samples, with no
  assumption about their distribution: `CONFIDENCE` or more, as the next interval that the number of repeats allows;
- beyond noise is a change whose interval does not hold 1. With fewer than four repeats on either side no such interval
  exists, and the verdict says that rather than guess.

Of a hundred metrics that did not change, chance alone calls up to five changed: read the size too. Samples of one
run have more in common than samples of two runs (where memory happened to lie, who shares the processor): a change
of a few percent wants a second pair of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from statistics import median
from typing import Literal

from perf.results import BASELINE, Result, Spread
from perf.scenarios import SCENARIOS, Metric, Scenario

CONFIDENCE = 0.95
Verdict = Literal["better", "worse", "no difference", "too few repeats"]
LESS_IS_BETTER = ("µs", "%", "CPU-s/GB", "CPU-s/Mpkt")


@dataclass(frozen=True)
class Change:
    """One metric of one system in two runs.

    `before` and `after` are values, or ratios to the baseline (`relative`); `factor` is the change with its interval.
    """

    scenario: Scenario
    metric: Metric
    system: str
    relative: bool
    before: Spread
    after: Spread
    factor: Spread | None
    verdict: Verdict


def compare(before: Result, after: Result) -> list[Change]:
    """Every metric that both results have."""
    return [
        change
        for scenario in SCENARIOS
        for metric in scenario.metrics
        for system in before.plan.systems
        for change in _change(before, after, scenario, metric, system)
    ]


def _change(before: Result, after: Result, scenario: Scenario, metric: Metric, system: str) -> Iterator[Change]:
    """The change of a metric; none if a result lacks it."""
    relative = system != BASELINE and all(it.values(scenario.name, BASELINE, metric.key) for it in (before, after))
    old, new = (_series(it, scenario.name, system, metric.key, relative) for it in (before, after))
    if not old or not new:
        return
    factor = shift(old, new) if min(*old, *new) > 0 else None
    verdict = _verdict(factor, less_is_better=metric.unit in LESS_IS_BETTER)
    yield Change(scenario, metric, system, relative, _spread(old), _spread(new), factor, verdict)


def _series(result: Result, scenario: str, system: str, metric: str, relative: bool) -> list[float]:
    """A metric by repeat, relative to the baseline's of the same repeat or as it is."""
    if relative:
        return list(result.ratios(scenario, system, metric).values())
    return list(result.values(scenario, system, metric).values())


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def _verdict(factor: Spread | None, *, less_is_better: bool) -> Verdict:
    if factor is None:
        return "too few repeats"
    if factor.low <= 1 <= factor.high:
        return "no difference"
    return "better" if (factor.median < 1) == less_is_better else "worse"


def shift(old: Sequence[float], new: Sequence[float]) -> Spread | None:
    """How many times `old` is `new`: median of the quotients of every pair, and the exact interval.

    None if there are too few values for an interval of that confidence. All values are positive.
    """
    quotients = sorted(b / a for a in old for b in new)
    outside = _outside(len(old), len(new))
    if outside == 0:
        return None
    return Spread(median(quotients), quotients[outside - 1], quotients[-outside])


def _outside(n: int, m: int) -> int:
    """How many of the n·m ordered quotients may lie beyond either end: the largest k with
    P(U < k) ≤ (1 - CONFIDENCE)/2."""
    tail, count = 0, 0
    for u in range(n * m):
        tail += arrangements(n, m, u)
        if tail / comb(n + m, n) > (1 - CONFIDENCE) / 2:
            break
        count = u + 1
    return count


@cache
def arrangements(n: int, m: int, u: int) -> int:
    """Orders of n and m values in which U, the pairs in which the first kind is larger, is u (Mann, Whitney 1947)."""
    if u < 0:
        return 0
    if n == 0 or m == 0:
        return int(u == 0)
    return arrangements(n - 1, m, u - m) + arrangements(n, m - 1, u)
