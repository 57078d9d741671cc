"""Results as tables: on the terminal with rich, in the documentation as Markdown."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perf.compare import CONFIDENCE, LESS_IS_BETTER, Change
from perf.results import BASELINE, Memory, Result, Spread
from perf.scenarios import SCENARIOS, Scenario
from perf.thresholds import SYSTEM, Verdict, judge

NOTHING = "–"
"""Where there is no number."""
RESULTS = "results"
"""Of the marks in a page around what `inserted` writes, unless told otherwise."""


def marks(name: str) -> tuple[str, str]:
    """The lines around a result in a page."""
    return f"<!-- {name} -->\n", f"<!-- end of {name.removeprefix('study ')} -->\n"


@dataclass(frozen=True)
class Grid:
    """A table of text, first column words, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(result: Result) -> list[Grid]:
    """All tables of a result that have rows."""
    every = [comparison(result), memory(result)]
    if SYSTEM in result.plan.systems:
        every.append(verdicts(judge(result)))
    return [grid for grid in every if grid.rows]


def comparison(result: Result) -> Grid:
    """A row a metric: median (least–most) on each system, and the appliance's ratio to the baseline.

    The first metric of a scenario gives its row the scenario's name; those after it are marked with a dot.
    """
    plan = result.plan
    title = f"medians (least–most) of {plan.repeats} repeats of {plan.seconds} s"
    ratio = (f"{SYSTEM} / {BASELINE}",) if {SYSTEM, BASELINE} <= set(plan.systems) else ()
    return Grid(title, ("", *plan.systems, *ratio), tuple(_rows(result, bool(ratio))))


def _rows(result: Result, ratio: bool) -> Iterator[tuple[str, ...]]:
    for scenario in SCENARIOS:
        for metric in scenario.metrics:
            first = metric is scenario.metrics[0]
            name = f"{scenario.sentence}, {metric.unit}" if first else f"· {metric.title}, {metric.unit}"
            spreads = [result.spread(scenario.name, system, metric.key) for system in result.plan.systems]
            cells = [_number(spread, metric.digits) for spread in spreads]
            if any(spreads):
                ratios = [_number(result.ratio(scenario.name, SYSTEM, metric.key), 2)] if ratio else []
                yield (name, *cells, *ratios)


def _number(spread: Spread | None, digits: int) -> str:
    """`median (least–most)`."""
    if spread is None:
        return NOTHING
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}–{spread.high:.{digits}f})"


def memory(result: Result) -> Grid:
    """A row a kind of process: how many there are, and what they hold."""
    kinds = dict.fromkeys((each.system, each.node, each.role) for each in result.memory)
    rows = (_held(kind, [it for it in result.memory if (it.system, it.node, it.role) == kind]) for kind in kinds)
    return Grid("memory (PSS)", ("", "processes", "MiB each"), tuple(rows))


def _held(kind: tuple[str, str, str], members: list[Memory]) -> tuple[str, str, str]:
    each = ", ".join(f"{member.pss_mib:.0f}" for member in members)
    return f"{' '.join(kind)}", str(len(members)), each


def verdicts(found: Iterable[Verdict]) -> Grid:
    """A row a threshold."""
    rows = tuple((it.threshold.sentence, *_outcome(it)) for it in found)
    return Grid("thresholds", ("", "measured", ""), rows)


def _outcome(verdict: Verdict) -> tuple[str, str]:
    """The number, and what it means."""
    if verdict.value is None:
        return NOTHING, "not measured"
    return f"{verdict.value.median:.2f}", "met" if verdict.met else "missed"


def changes(found: Iterable[Change]) -> Grid:
    """A row a metric and system that two results have; `×` marks ratios to the baseline."""
    head = ("", "system", "before", "after", "change", "verdict")
    return Grid(f"changes, {CONFIDENCE:.0%} intervals; × of {BASELINE}", head, tuple(map(_changed, found)))


def _changed(it: Change) -> tuple[str, ...]:
    digits, unit = (2, "×") if it.relative else (it.metric.digits, it.metric.unit)
    what = f"{it.scenario.sentence}, {it.metric.title}, {unit}"
    factor = NOTHING
    if it.factor is not None:
        factor = f"{it.factor.median - 1:+.1%} ({it.factor.low - 1:+.1%} to {it.factor.high - 1:+.1%})"
    return what, it.system, _number(it.before, digits), _number(it.after, digits), factor, it.verdict


def show(console: Console, result: Result) -> None:
    """Prints the tables, and what failed."""
    for grid in grids(result):
        print_grid(console, grid)
    for sample in result.failures():
        console.print(f"[red]failed[/]: {sample.scenario} on {sample.system}: {escape(sample.error)}")


def print_grid(console: Console, grid: Grid) -> None:
    """Prints one table."""
    table = Table(*(escape(word) for word in grid.head), title=grid.title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in grid.rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def markdown(result: Result) -> str:
    """The machine, the command and the tables as Markdown."""
    facts = "\n".join(f"| {key} | {value} |" for key, value in result.machine.items())
    head = f"`{result.command}`, {result.started:%Y-%m-%d %H:%M} UTC, on\n\n| machine | |\n|---|---|\n{facts}\n"
    return "\n".join([head, *(_markdown(grid) for grid in grids(result))])


def _markdown(grid: Grid) -> str:
    lines = [grid.head, ("---", *("--:" for _ in grid.head[1:])), *grid.rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"**{grid.title}**\n\n{table}\n"


def short(result: Result, scenarios: Iterable[str]) -> str:
    """The first metric of some scenarios on the baseline and the appliance, as Markdown, and the command."""
    head = ("", BASELINE, SYSTEM, f"{SYSTEM} / {BASELINE}")
    rows = tuple(_short_row(result, scenario) for scenario in SCENARIOS if scenario.name in set(scenarios))
    table = _markdown(Grid("", head, rows)).partition("\n\n")[2]
    return f"{table}\n`{result.command}`, commit {result.machine.get('commit', 'unknown')}.\n"


def _short_row(result: Result, scenario: Scenario) -> tuple[str, ...]:
    metric = scenario.metrics[0]
    medians = [result.spread(scenario.name, system, metric.key) for system in (BASELINE, SYSTEM)]
    ratio = result.ratio(scenario.name, SYSTEM, metric.key)
    numbers = [NOTHING if it is None else f"{it.median:.{metric.digits}f}" for it in medians]
    better = "less" if metric.unit in LESS_IS_BETTER else "more"
    name = f"{scenario.sentence}, {metric.unit} ({better} is better)"
    return name, *numbers, NOTHING if ratio is None else f"{ratio.median:.2f}"


def inserted(page: str, result: Result, name: str = RESULTS) -> str:
    """A page with the text between the marks of that name replaced by a result. Raises ValueError for a page without
    them."""
    return between(page, name, markdown(result))


def between(page: str, name: str, text: str) -> str:
    """A page with what is between the marks of that name replaced. Raises ValueError for a page without them."""
    begin, end = marks(name)
    before, found, rest = page.partition(begin)
    _old, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"expected the marks {begin.strip()} and {end.strip()}")
    return f"{before}{begin}{text}{end}{after}"
