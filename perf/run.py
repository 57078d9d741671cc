"""A run: build everything once, then measure every scenario on every system, round after round.

The order is repeat, scenario, system: A B C A B C. Systems of a pair run within seconds of each other, and
the repeats of a scenario are minutes apart, so that a short disturbance of the machine harms one repeat and
shows in the spread."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime

from appliance.client import ApiError
from appliance.lab.plan import setting
from perf import environment, meter, net, topology
from perf.load.tool import ToolError
from perf.net import NetError
from perf.results import Memory, Plan, Result, Sample
from perf.scenarios import SCENARIOS, Scenario
from perf.systems import ALL
from perf.systems.system import WORKER, System
from perf.topology import Path

FAILURES = (ToolError, NetError, ApiError, OSError)
"""What makes one sample fail and not the run."""
QUIET_PERCENT = 5
"""Of the processor time: what else runs on a machine that is fit to measure."""
Report = Callable[[str], None]
"""Takes a sentence about what is being done."""
Seen = Callable[[Sample], None]
"""Takes a sample as soon as it is there."""


def run(plan: Plan, report: Report, seen: Seen) -> Result:
    """Measures what a plan asks for. Raises NetError, LabError, ApiError if it cannot be set up.

    A sample that fails is in the result with its error; the others go on.
    """
    started, machine = datetime.now(UTC).replace(microsecond=0), environment.machine()
    if machine["busy_before_percent"] > QUIET_PERCENT:
        report(f"machine: expected to be quiet, {machine['busy_before_percent']} % busy: do not trust the numbers")
    systems = [system for system in ALL if system.name in plan.systems]
    with net.workspace():
        topology.build(map(setting, plan.settings), report, appliance="appliance" in plan.systems)
        paths = {system.name: system.set_up() for system in systems}
        samples = list(_samples(plan, systems, paths, seen))
        return Result(
            started=started,
            command=shlex.join(["python", "-m", "perf", *sys.argv[1:]]),
            machine=machine,
            systems={system.name: system.describe() for system in systems},
            plan=plan,
            samples=tuple(samples),
            memory=tuple(_memory(systems)),
        )


def _samples(plan: Plan, systems: list[System], paths: dict[str, Path], seen: Seen) -> Iterator[Sample]:
    """Every sample of the plan, in order."""
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in plan.scenarios]
    for repeat in range(plan.repeats):
        for scenario in scenarios:
            for system in systems:
                sample = _sample(scenario, system, paths[system.name], repeat, plan.seconds)
                seen(sample)
                yield sample


def _sample(scenario: Scenario, system: System, path: Path, repeat: int, seconds: int) -> Sample:
    """One sample; a failure of the system or a tool is in it."""
    values, error = {}, ""
    try:
        workers = [process.pid for process in system.processes() if process.role == WORKER]
        values = scenario.measure(path, workers, seconds)
    except FAILURES as failure:
        error = str(failure)
    return Sample(scenario=scenario.name, system=system.name, repeat=repeat, values=values, error=error)


def _memory(systems: Iterable[System]) -> Iterator[Memory]:
    """What each process holds, after all the traffic."""
    for system in systems:
        for process in system.processes():
            held = round(meter.pss_mib(process.pid), 1)
            yield Memory(system=system.name, node=process.node, role=process.role, pss_mib=held)
