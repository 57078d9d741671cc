"""Figures of result files and studies, as PNG and SVG, and one page of HTML that embeds them.

Needs matplotlib: `pip install -e '.[perf]'`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from cycler import cycler

mpl.use("Agg")
from matplotlib import pyplot as plt

from perf.compare import LESS_IS_BETTER
from perf.results import BASELINE, Result, Spread
from perf.scenarios import SCENARIOS, Scenario
from perf.sections import section
from perf.study import Curve, Figure, Study

SIZE: Final = (7.0, 4.2)
"""Inches."""
DPI: Final = 130
COLORS: Final = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
"""Told apart by the colour-blind too, and in this order (Observable 10)."""

mpl.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "svg.hashsalt": "edge-appliance",  # the same figure is the same file
        "svg.fonttype": "none",
    }
)

Drawn = tuple[str, str, Any]
"""Name of the files, title, and matplotlib's figure."""


def drawn(results: Iterable[Result | Study]) -> Iterator[Drawn]:
    """Every figure of the results."""
    for result in results:
        if isinstance(result, Study):
            for figure in result.figures:
                yield figure.key, figure.title, lines(figure)
        else:
            for scenario in SCENARIOS:
                if result.spread(scenario.name, BASELINE, scenario.metrics[0].key):
                    yield f"bars-{scenario.name}", scenario.sentence, bars(result, scenario)


def lines(figure: Figure) -> Any:
    """Curves in one coordinate system."""
    made, axes = plt.subplots(figsize=SIZE, layout="constrained")
    for curve in figure.curves:
        _line(axes, curve, marked=len(curve.points) < MARKED)
    axes.set(title=figure.title, xlabel=figure.x, ylabel=figure.y)
    axes.set_xscale("log" if figure.log_x else "linear")
    axes.set_yscale("log" if figure.log_y else "linear")
    if not figure.log_y:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return made


MARKED: Final = 20
"""Points of a curve from which on it is drawn without marks."""


def _line(axes: Any, curve: Curve, *, marked: bool) -> None:
    x, y = zip(*curve.points, strict=True) if curve.points else ((), ())
    axes.plot(x, y, label=curve.name, marker="o" if marked else None, markersize=4)


def bars(result: Result, scenario: Scenario) -> Any:
    """A bar a system, its least and most, and its ratio to the baseline."""
    metric = scenario.metrics[0]
    found = {name: result.spread(scenario.name, name, metric.key) for name in result.plan.systems}
    spreads: dict[str, Spread] = {name: it for name, it in found.items() if it}
    names, medians = list(spreads), [it.median for it in spreads.values()]
    errors = [[it.median - it.low for it in spreads.values()], [it.high - it.median for it in spreads.values()]]
    made, axes = plt.subplots(figsize=(SIZE[0], 1.2 + 0.34 * len(names)), layout="constrained")
    colors = [COLORS[2] if name.startswith("appliance") else COLORS[0] for name in names]
    axes.barh(names, medians, xerr=errors, color=colors, error_kw={"ecolor": "#444", "capsize": 3})
    for place, (name, spread) in enumerate(spreads.items()):
        ratio = result.ratio(scenario.name, name, metric.key)
        text = f"  {spread.median:,.{metric.digits}f}" + (f" = {ratio.median:.2f} ×" if ratio else "")
        axes.text(spread.high, place, text, va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.grid(visible=False, axis="y")
    sense = "less is better" if metric.unit in LESS_IS_BETTER else "more is better"
    axes.set(title=scenario.sentence, xlabel=f"{metric.unit}, {sense}; × of {BASELINE}")
    return made


def write(results: list[Result | Study], directory: Path) -> list[Path]:
    """PNG and SVG of every figure, and index.html with all of them and the tables. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    written, figures = [], []
    for key, title, made in drawn(results):
        for kind in ("png", "svg"):
            path = directory / f"{key}.{kind}"
            made.savefig(path, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
            written.append(path)
        figures.append((title, _svg(made)))
        plt.close(made)
    index = directory / "index.html"
    index.write_text(page(results, figures))
    return [*written, index]


def _svg(made: Any) -> str:
    """A figure as an element of a page."""
    text = io.StringIO()
    made.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


STYLE: Final = """ body { font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1em;
color: #222 } figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; max-width: 700px } figure svg
{ max-width: 100%; height: auto } table { border-collapse: collapse; margin: 0 0 1em } td, th { padding: .15em .7em;
text-align: right; white-space: nowrap } td:first-child, th:first-child { text-align: left } tr + tr { border-top: 1px
solid #ddd } code { white-space: pre-wrap } """


def page(results: list[Result | Study], figures: list[tuple[str, str]]) -> str:
    """One page of HTML that needs nothing else."""
    drawings = "\n".join(f"<figure>{svg}</figure>" for _title, svg in figures)
    tables = "\n".join(section(it) for it in results)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Benchmarks</title><style>{STYLE}</style>"
    return f"{head}<h1>Benchmarks</h1>\n{drawings}\n{tables}</html>\n"
