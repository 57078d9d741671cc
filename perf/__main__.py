"""The command line: `python -m perf --help`."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
from pydantic import ValidationError
from rich.console import Console

from appliance.client import ApiError
from appliance.lab.lifecycle import LabError
from appliance.lab.plan import SpecError
from perf import meter, report, slow, smoke, thresholds
from perf.compare import compare as compare_results
from perf.load.tool import ToolError
from perf.net import NetError
from perf.results import Plan, Result, Sample
from perf.run import run as measure
from perf.scenarios import SCENARIOS
from perf.slow import enable as slow_down
from perf.study import Study
from perf.systems import ALL, MODES, OTHERS, USUAL

T = TypeVar("T")
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


OUTPUT = click.option("--output", type=click.Path(path_type=Path), help=f"Result file; a new one in {RESULTS}.")
SETTINGS = click.option("--set", "settings", multiple=True, help="A key of the appliance's configuration.")
SECONDS_OPTION = click.option("--seconds", type=click.IntRange(1), default=2, show_default=True, help="Of each trial.")


def _finished(study: Study, output: Path | None) -> None:
    """Prints a study and writes its file."""
    path = output or RESULTS / f"{study.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    study.save(path)
    width = max(len(fact.what) for fact in study.facts)
    for fact in study.facts:
        click.echo(f"{fact.what:{width}}  {fact.value}")
    click.echo(f"result: {path}")


@main.command()
@OUTPUT
def tables(output: Path | None) -> None:
    """From the cluster's answers to the workers' tables, with 10,000 services."""
    from perf.tables import measure as measure_tables

    _finished(measure_tables().study(), output)


@main.command()
@OUTPUT
def resync(output: Path | None) -> None:
    """How long a node takes to catch up with its cluster over a real broker, with 10,000 services."""
    from perf.resync import measure as measure_resync

    _finished(measure_resync().study(), output)


@main.command("path")
@OUTPUT
def path_(output: Path | None) -> None:
    """The packet path without the kernel: cost against flows, services, batch and cores."""
    from appliance.config import Config
    from appliance.dataplane import cache

    cache.use(Config().paths.cache)  # before numba is imported
    from perf.path import measure as measure_path

    _finished(measure_path(), output)


@main.command()
@OUTPUT
def naming(output: Path | None) -> None:
    """The resolver beside dnsmasq: answers a second, and how long they take."""
    from perf.naming import measure as measure_naming

    _finished(measure_naming(), output)


@main.command()
@click.option("--nodes", type=click.IntRange(1), default=5_000, show_default=True)
@click.option("--services", type=click.IntRange(1), default=50_000, show_default=True)
@click.option("--qos", type=click.IntRange(0, 1), default=0, show_default=True, help="Of the nodes' subscriptions.")
@click.option("--brokers", type=click.IntRange(1, 5), default=1, show_default=True, help="More than one: a cluster.")
@click.option(
    "--replicas", type=click.IntRange(1, 5), default=1, show_default=True, help="Brokers that keep a message."
)
@click.option("--managers", type=click.IntRange(1, 5), default=1, show_default=True, help="In one queue group.")
@click.option("--sync", default="always", show_default=True, help="When one broker writes to the disk.")
@OUTPUT
def storm(output: Path | None, **setting: Any) -> None:
    """Simulated nodes and services against cluster service managers."""
    from perf.storm import Setting
    from perf.storm import measure as measure_storm

    if setting["brokers"] > 1 and setting["sync"] != "always":
        raise click.UsageError("--sync: expected with one broker only")
    _finished(measure_storm(Setting(**setting), _say), output)


@main.command()
@click.option("--minutes", type=click.FloatRange(min=0.1), default=30.0, show_default=True)
@OUTPUT
def soak(minutes: float, output: Path | None) -> None:
    """Call three nodes for long while everything changes; fails if memory grows, or a drop has no excuse."""
    from perf.soak import measure as measure_soak

    study, good = _orderly(lambda: measure_soak(minutes, _say))
    _finished(study, output)
    sys.exit(int(not good))


@main.command()
@click.option("--systems", type=Names(SYSTEM_NAMES, GROUPS), default=GROUPS["usual"], help="Comma-separated.")
@click.option("--flows", type=click.IntRange(1), default=64, show_default=True)
@SECONDS_OPTION
@SETTINGS
@OUTPUT
def loss(systems: tuple[str, ...], flows: int, seconds: int, settings: tuple[str, ...], output: Path | None) -> None:
    """Packets a second that a system carries without loss, by binary search."""
    from perf.loss import measure as measure_loss

    plan = Plan(systems=systems, scenarios=(), repeats=1, seconds=seconds, settings=settings)
    _finished(_orderly(lambda: measure_loss(plan, flows, _say)), output)


@main.command()
@click.option("--systems", type=Names(SYSTEM_NAMES, GROUPS), default=GROUPS["usual"], help="Comma-separated.")
@click.option("--rate", type=float, default=5_000.0, show_default=True, help="Requests a second.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@SECONDS_OPTION
@SETTINGS
@OUTPUT
def latency(
    systems: tuple[str, ...], rate: float, repeats: int, seconds: int, settings: tuple[str, ...], output: Path | None
) -> None:
    """The distribution of response times with open-loop arrival."""
    from perf.latency import measure as measure_latency

    plan = Plan(systems=systems, scenarios=(), repeats=repeats, seconds=seconds, settings=settings)
    _finished(_orderly(lambda: measure_latency(plan, rate, _say)), output)


@main.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@SECONDS_OPTION
@OUTPUT
def flows(rounds: int, seconds: int, output: Path | None) -> None:
    """Two nodes, kernel included: a packet's cost against live flows, and what a second worker adds."""
    from perf.flows import measure as measure_flows

    _finished(_orderly(lambda: measure_flows(rounds, seconds, _say)), output)


@main.command()
@click.option("--systems", type=Names(SYSTEM_NAMES, GROUPS), default=("vxlan", "appliance"), help="Comma-separated.")
@click.option("--rates", default="1G,0", show_default=True, help="Of the bulk stream, bit/s; 0: as fast as it goes.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@SECONDS_OPTION
@OUTPUT
def mice(systems: tuple[str, ...], rates: str, repeats: int, seconds: int, output: Path | None) -> None:
    """Request and response beside a bulk stream that the same worker carries."""
    from perf.mice import measure as measure_mice

    plan = Plan(systems=systems, scenarios=(), repeats=repeats, seconds=seconds, settings=("workers.count=1",))
    _finished(_orderly(lambda: measure_mice(plan, tuple(rates.split(",")), _say)), output)


@main.command()
@SECONDS_OPTION
@OUTPUT
def stream(seconds: int, output: Path | None) -> None:
    """What a TCP stream makes two nodes do: system calls, sleeps and processor time a gigabyte."""
    from perf.stream import measure as measure_stream

    _finished(_orderly(lambda: measure_stream(seconds, _say)), output)


@main.command()
@OUTPUT
def calibrate(output: Path | None) -> None:
    """The generators against themselves, iperf3 and sockperf; fails if they are apart by more than a tenth."""
    from perf.calibrate import measure as measure_calibration

    plan = Plan(systems=("direct",), scenarios=(), repeats=1, seconds=1)
    study, agreed = _orderly(lambda: measure_calibration(plan, _say))
    _finished(study, output)
    sys.exit(int(not agreed))


@main.command()
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option(
    "--into", type=click.Path(path_type=Path, file_okay=False), default=RESULTS / "figures", show_default=True
)
def plot(files: tuple[Path, ...], into: Path) -> None:
    """Draw result FILES and studies: PNG, SVG, and one page of HTML."""
    try:
        from perf.plot import write
    except ImportError as error:
        raise click.ClickException(f"{error.name}: expected to be installed: pip install -e '.[perf]'") from error
    for path in write([_any(file) for file in files], into):
        click.echo(path)


def _any(file: Path) -> Result | Study:
    """What is in a file."""
    try:
        return Study.load(file)
    except ValidationError:
        return _loaded(file)


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
    return _orderly(lambda: measure(plan, _say, _tell))


def _say(sentence: str) -> None:
    """Tells progress on standard error."""
    click.echo(sentence, err=True)


def _orderly(work: Callable[[], T]) -> T:
    """Does what works in namespaces, with everything removed on an interrupt. Raises ClickException."""
    handle_interrupts()
    try:
        return work()
    except (NetError, LabError, SpecError, ApiError, ToolError) as error:
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
    click.echo(f"{sample.repeat + 1}  {sample.scenario:16}{sample.system:20}{said}", err=True)


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


@main.command("smoke")
@click.option("--slow", type=click.Choice(list(slow.KINDS)), help="Slow the workers down, to see that it is caught.")
@click.option("--set", "settings", multiple=True, help="A key of the appliance's configuration: section.key=value.")
@click.option("--record", type=FILE, help="Take the baseline's ratios from this result file instead of measuring.")
@click.option("--baseline", "file", type=click.Path(path_type=Path), default=smoke.FILE, help="The baseline's file.")
def smoke_(slow: str | None, settings: tuple[str, ...], record: Path | None, file: Path) -> None:
    """Fail if the appliance lost more than a fifth of its speed against VXLAN."""
    if record is not None:
        file.write_text(smoke.Baseline.of(_loaded(record)).model_dump_json(indent=1) + "\n")
        return
    if slow is not None:
        slow_down(slow)
    baseline = smoke.Baseline.model_validate_json(file.read_bytes())
    verdict = smoke.guard(
        baseline, lambda plan: _measured(plan.model_copy(update={"settings": settings})), click.echo, meter.busy_percent
    )
    click.echo(f"perf-smoke: {verdict.value}")
    sys.exit(int(verdict is smoke.Verdict.LOST))


@main.command("report")
@click.argument("file", type=FILE)
@click.option("--into", type=click.Path(path_type=Path, exists=True), help="A page whose results are replaced.")
@click.option("--as", "name", default=report.RESULTS, show_default=True, help="Of the marks, for a result of `run`.")
@click.option("--check", is_flag=True, help="Fail unless the appliance meets every threshold.")
def report_(file: Path, into: Path | None, name: str, check: bool) -> None:
    """Print the tables of a result FILE, or write them into a page between its marks."""
    result = _any(file)
    if isinstance(result, Study):
        if into is None:
            click.echo(result.markdown())
        else:
            into.write_text(result.inserted(into.read_text()))
        return
    if into is None:
        report.show(Console(), result)
    else:
        into.write_text(report.inserted(into.read_text(), result, name))
    sys.exit(_status(result, check))


@main.command("pages")
@click.option("--check", is_flag=True, help="Write nothing; fail if a block differs from its files.")
def pages_(check: bool) -> None:
    """Write what README and docs/benchmarks.md show of the committed result files."""
    from perf import pages

    try:
        if not check:
            pages.write()
            return
        different = list(pages.differing())
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for sentence in different:
        click.echo(sentence, err=True)
    sys.exit(int(bool(different)))


if __name__ == "__main__":
    main()
