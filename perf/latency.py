"""The distribution of response times with open-loop arrival, each system at the same rate."""

from __future__ import annotations

from perf import run, scenarios
from perf.results import Plan
from perf.study import Curve, Figure, Study, study


def measure(plan: Plan, rate: float, report: run.Report) -> Study:
    """All systems in turn, as many rounds as the plan says; the round with the median of medians counts."""
    rounds: dict[str, list[tuple[tuple[float, float], ...]]] = {}
    with run.session(plan, report) as (systems, paths):
        for _ in range(plan.repeats):
            for system in systems:
                with system.active():
                    answered = scenarios.open_answers(paths[system.name], plan.seconds, rate)
                report(f"{system.name}: median {answered['percentiles']['p50']:.1f} µs, {answered['lost']} lost")
                rounds.setdefault(system.name, []).append(tuple(map(tuple, answered["curve"])))
    chosen = {name: sorted(curves, key=lambda it: at(it, 50))[len(curves) // 2] for name, curves in rounds.items()}
    facts = {
        f"{name}: 50, 90, 99, 99.9 %, µs": ", ".join(f"{at(curve, rank):.0f}" for rank in (50, 90, 99, 99.9))
        for name, curve in chosen.items()
    }
    lines = tuple(
        Curve(name=name, points=tuple((time, rank / 100) for rank, time in curve)) for name, curve in chosen.items()
    )
    title = f"UDP request and response, {rate:,.0f}/s, open-loop arrival"
    figure = Figure(key="latency", title=title, x="response time, µs", y="part", log_x=True, curves=lines)
    return study("latency", __doc__ or "", facts, figure)


def at(curve: tuple[tuple[float, float], ...], rank: float) -> float:
    """The time that so many percent did not exceed."""
    return next(time for each, time in curve if each >= rank - 1e-9)
