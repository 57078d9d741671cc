"""A run: build everything once, then measure every scenario on every system, round after round.

The order is repeat, scenario, system: A B C A B C. Systems of a pair run within seconds of each other, and
the repeats of a scenario are minutes apart, so that a short disturbance of the machine harms one repeat and
shows in the spread. Modes of the appliance need a restart: each has its turn of all scenarios in every repeat."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby, product

from appliance.client import ApiError
from appliance.lab.lifecycle import LabError
from appliance.lab.plan import setting
from perf import environment, meter, net, topology
from perf.load.tool import ToolError
from perf.net import NetError
from perf.results import Memory, Plan, Result, Sample
from perf.scenarios import SCENARIOS, Scenario
from perf.systems import ALL
from perf.systems.appliance import Appliance
from perf.systems.system import WORKER, System
from perf.topology import Path

FAILURES = (ToolError, NetError, LabError, ApiError, OSError)
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
    with session(plan, report) as (systems, paths):
        described = {system.name: system.describe() for system in systems}
        samples = tuple(_samples(plan, systems, paths, seen))
        return Result(
            started=started,
            command=shlex.join(["python", "-m", "perf", *sys.argv[1:]]),
            machine=machine,
            systems=described,
            plan=plan.model_copy(update={"systems": tuple(described)}),
            samples=samples,
            memory=tuple(_memory(systems)),
        )


@contextmanager
def session(plan: Plan, report: Report) -> Iterator[tuple[list[System], dict[str, Path]]]:
    """The network with all usable systems of a plan on it, and their paths by name; removed when the block ends."""
    with net.workspace():
        systems = _usable(plan, report)
        needs_lab = any(isinstance(system, Appliance) for system in systems)
        topology.build(map(setting, plan.settings), report, appliance=needs_lab)
        yield systems, {system.name: system.set_up() for system in systems}


def _usable(plan: Plan, report: Report) -> list[System]:
    """The systems of a plan that this machine has what they need for; the others are named aloud."""
    systems = []
    for system in ALL:
        if system.name in plan.systems and (missing := system.missing()):
            report(f"{system.name}: NOT MEASURED, it needs {', '.join(missing)} (Debian packages)")
        elif system.name in plan.systems:
            systems.append(system)
    return systems


def _samples(plan: Plan, systems: list[System], paths: dict[str, Path], seen: Seen) -> Iterator[Sample]:
    """Every sample of the plan, in order; none where a system has nothing to carry it with."""
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in plan.scenarios]
    groups = [list(members) for _, members in groupby(systems, key=lambda system: system.group)]
    for repeat, group, scenario in product(range(plan.repeats), groups, scenarios):
        for system in group:
            if scenario.v6 and not paths[system.name].address_v6:
                continue
            sample = _sample(scenario, system, paths[system.name], repeat, plan.seconds)
            seen(sample)
            yield sample


def _sample(scenario: Scenario, system: System, path: Path, repeat: int, seconds: int) -> Sample:
    """One sample; a failure of the system or a tool is in it."""
    values, error = {}, ""
    try:
        with system.active():
            workers = [process.pid for process in system.processes() if process.role == WORKER]
            values = scenario.measure(path, workers, seconds)
    except FAILURES as failure:
        error = str(failure)
    return Sample(scenario=scenario.name, system=system.name, repeat=repeat, values=values, error=error)


def _memory(systems: Iterable[System]) -> Iterator[Memory]:
    """What each process holds, after all the traffic; of the appliance as it was last, or as usual."""
    for system in systems:
        if system.group and any(not it.group and isinstance(it, Appliance) for it in systems):
            continue
        for process in system.processes():
            held = round(meter.pss_mib(process.pid), 1)
            yield Memory(system=system.name, node=process.node, role=process.role, pss_mib=held)
