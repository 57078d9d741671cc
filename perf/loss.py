"""Packets a second against loss: the rate that a system carries without loss, by binary search (RFC 2544, section
26.1).

A trial sends at a fixed rate for some seconds. The highest rate at which no more than TOLERATED is lost is found by
halving the interval between one that passed and one that failed, TRIALS times. RFC 2544 wants no loss at all, in
trials of 60 s on idle hardware; where load generators share the CPUs a scheduler's whim costs a packet in ten
thousand, so TOLERATED is not zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from perf import run, scenarios
from perf.results import Plan
from perf.study import Curve, Figure, Study, study

TOLERATED: Final = 0.1
"""Percent."""
TRIALS: Final = 9
HIGHEST: Final = 800_000
"""Packets a second: more than one core of a generator offers."""

Trial = Callable[[float], tuple[float, float]]
"""Offers so many packets a second: what was offered in truth, and the loss in percent."""


def search(trial: Trial) -> tuple[float, list[tuple[float, float]]]:
    """The highest rate that passed, 0 if none, and all trials."""
    low, high, best, trials = 0.0, float(HIGHEST), 0.0, []
    for _ in range(TRIALS):
        rate = (low + high) / 2
        offered, lost = trial(rate)
        trials.append((offered, lost))
        if lost <= TOLERATED and offered >= OFFERED * rate:
            low, best = rate, max(best, offered)
        else:
            high = rate
    return best, sorted(trials)


OFFERED: Final = 0.95
"""Of a rate that a generator must reach for a trial to count: or it is the generator that is measured."""


def measure(plan: Plan, flows: int, report: run.Report) -> Study:
    """The search on each system of a plan, in turn."""
    facts, curves = {}, []
    with run.session(plan, report) as (systems, paths):
        for system in systems:

            def trial(rate: float, name: str = system.name) -> tuple[float, float]:
                values = scenarios.udp(paths[name], [], plan.seconds, flows=flows, rate=rate)
                report(f"{name}: {values['offered_kpps']:.1f} kpps offered, {values['loss_percent']:.2f} % lost")
                return values["offered_kpps"] * 1e3, values["loss_percent"]

            with system.active():
                best, trials = search(trial)
            facts[f"{system.name}: carried with at most {TOLERATED} % lost, kpps"] = f"{best / 1e3:.1f}"
            curves.append(Curve(name=system.name, points=tuple((rate / 1e3, lost) for rate, lost in trials)))
    title = f"UDP, {scenarios.UDP_PAYLOAD} bytes, {flows} flows: packets against loss"
    figure = Figure(key="loss", title=title, x="offered, kpps", y="lost, %", curves=tuple(curves))
    return study("loss", __doc__ or "", facts, figure)
