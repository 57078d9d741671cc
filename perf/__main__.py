"""The command line: `python -m perf --help`."""

import os
import signal
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import click
from pydantic import ValidationError
from rich.console import Console

from appliance.client import ApiError
from appliance.config import Config
from appliance.dataplane import cache
from appliance.lab.lifecycle import LabError
from appliance.lab.plan import SpecError
from perf import report, thresholds
from perf.compare import compare as compare_results
from perf.net import NetError
from perf.results import Plan, Result, Sample
from perf.run import run as measure
from perf.scenarios import SCENARIOS
from perf.systems import ALL, MODES, OTHERS, USUAL

SECONDS, REPEATS = 3, 5
QUICK_SECONDS, QUICK_REPEATS = 2, 2
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
RESULTS = Path(".cache/perf")
"""Where results go that nobody asked to keep; those in perf/results are committed."""


class Names(click.ParamType[tuple[str, ...]]):
    """A comma-separated choice."""

    name = "names"

    def __init__(self, choices: tuple[str, ...], groups: dict[str, tuple[str, ...]] | None = None) -> None:
        self._choices, self._groups = choices, groups or {}

    def convert(
        self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The chosen names in their usual order."""
        words = value.split(",") if isinstance(value, str) else value
        chosen = [name for word in words for name in self._groups.get(word, (word,))]
        for name in chosen:
            if name not in self._choices:
                self.fail(f"expected some of {', '.join((*self._groups, *self._choices))}, got {name!r}", param, ctx)
        return tuple(name for name in self._choices if name in chosen)


GROUPS = {
    name: tuple(system.name for system in systems)
    for name, systems in (("usual", USUAL), ("others", OTHERS), ("modes", MODES), ("all", ALL))
}
SYSTEM_NAMES = GROUPS["all"]
INSTALLED = GROUPS["usual"] + GROUPS["others"]
"""What is measured unless asked for otherwise; of these, what is installed."""
SCENARIO_NAMES = tuple(scenario.name for scenario in SCENARIOS)


@click.group()
def main() -> None:
    """Measures direct routing, kernel VXLAN and the appliance side by side."""


@main.command("list")
def list_() -> None:
    """What can be measured, and on what."""
    for kind, each in (("systems", ALL), ("scenarios", SCENARIOS)):
        click.echo(f"{kind}:")
        for it in each:
            click.echo(f"  {it.name:20}{it.sentence}")


@main.command()
def tables() -> None:
    """From the cluster's answers to the workers' tables, with 10,000 services."""
    from perf.tables import measure as measure_tables

    for line in measure_tables().lines():
        click.echo(line)


@main.command()
def path() -> None:
    """The compiled path alone, without system calls: few live flows against many."""
    from perf.path import measure as measure_path

    cache.use(Config().paths.cache)
    for cost in measure_path():
        click.echo(f"{cost.flows:7,} flows: {cost.out:4.0f} ns a packet out, {cost.back:4.0f} ns in")


@main.command()
@click.option(
    "--systems",
    type=Names(SYSTEM_NAMES, GROUPS),
    default=INSTALLED,
    help="Comma-separated; also `usual`,\
 `others`, `modes`, `all`. Default: usual,others.",
)
@click.option("--scenarios", type=Names(SCENARIO_NAMES), default=SCENARIO_NAMES, help="Comma-separated.")
@click.option("--repeats", type=click.IntRange(1), help=f"Rounds of everything; {REPEATS}.")
@click.option("--seconds", type=click.IntRange(1), help=f"Of load in a sample; {SECONDS}.")
@click.option("--quick", is_flag=True, help=f"{QUICK_REPEATS} repeats of {QUICK_SECONDS} s.")
@click.option("--set", "settings", multiple=True, help="A key of the appliance's configuration: section.key=value.")
@click.option("--output", type=click.Path(path_type=Path), help=f"Result file; a new one in {RESULTS}.")
@click.option("--check", is_flag=True, help="Fail unless the appliance meets every threshold.")
def run(
    systems: tuple[str, ...],
    scenarios: tuple[str, ...],
    repeats: int | None,
    seconds: int | None,
    quick: bool,
    settings: tuple[str, ...],
    output: Path | None,
    check: bool,
) -> None:
    """Measure, print the tables, write the result file."""
    plan = Plan(
        systems=systems,
        scenarios=scenarios,
        repeats=repeats or (QUICK_REPEATS if quick else REPEATS),
        seconds=seconds or (QUICK_SECONDS if quick else SECONDS),
        settings=settings,
    )
    result = _measured(plan)
    path = output or RESULTS / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    result.save(path)
    report.show(Console(), result)
    click.echo(f"result: {path}")
    sys.exit(_status(result, check))


def _measured(plan: Plan) -> Result:
    """Runs the plan, with its progress on standard error."""
    handle_interrupts()
    try:
        return measure(plan, lambda said: click.echo(said, err=True), _tell)
    except (NetError, LabError, SpecError, ApiError) as error:
        raise click.ClickException(str(error)) from error


def handle_interrupts() -> None:
    """Ends a run as Ctrl-C does, with everything removed, on SIGTERM too.

    Only in this process: pyroute2 forks helpers, which must not remove what they did not make.
    """
    owner = os.getpid()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _tell(sample: Sample) -> None:
    """One line a sample: its first metric, or why it failed."""
    said = sample.error
    for scenario in SCENARIOS:
        if scenario.name == sample.scenario and not sample.error:
            metric = scenario.metrics[0]
            said = f"{sample.values[metric.key]:.{metric.digits}f} {metric.unit}"
    click.echo(f"{sample.repeat + 1}  {sample.scenario:12}{sample.system:20}{said}", err=True)


def _status(result: Result, check: bool) -> int:
    """Exit status: 0, or 1 if a sample failed or a threshold that was to be checked is missed."""
    missed = check and not all(verdict.met for verdict in thresholds.judge(result))
    return int(missed or bool(result.failures()))


def _loaded(file: Path) -> Result:
    """The result in a file. Raises ClickException."""
    try:
        return Result.load(file)
    except ValidationError as error:
        raise click.ClickException(f"{file}: expected a result: {error}") from error


@main.command()
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@click.option("--all", "everything", is_flag=True, help="Also what did not change.")
@click.option("--check", is_flag=True, help="Fail if anything of the appliance got worse.")
def compare(before: Path, after: Path, everything: bool, check: bool) -> None:
    """What differs between two result files beyond noise."""
    old, new = _loaded(before), _loaded(after)
    for key in sorted(old.machine.keys() | new.machine.keys()):
        if old.machine.get(key) != new.machine.get(key):
            click.echo(f"{key}: {old.machine.get(key)} before, {new.machine.get(key)} after")
    changes = compare_results(old, new)
    shown = [it for it in changes if everything or it.verdict in ("better", "worse")]
    if shown:
        report.print_grid(Console(width=160), report.changes(shown))
    counted = Counter(it.verdict for it in changes)
    click.echo(f"{len(changes)} metrics: {', '.join(f'{many} {verdict}' for verdict, many in counted.items())}")
    sys.exit(int(check and any(it.verdict == "worse" and it.system == thresholds.SYSTEM for it in changes)))


@main.command("report")
@click.argument("file", type=FILE)
@click.option("--into", type=click.Path(path_type=Path, exists=True), help="A page whose results are replaced.")
@click.option("--check", is_flag=True, help="Fail unless the appliance meets every threshold.")
def report_(file: Path, into: Path | None, check: bool) -> None:
    """Print the tables of a result FILE, or write them into a page between its marks."""
    result = _loaded(file)
    if into is None:
        report.show(Console(), result)
    else:
        into.write_text(report.inserted(into.read_text(), result))
    sys.exit(_status(result, check))


if __name__ == "__main__":
    main()
