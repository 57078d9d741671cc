"""What the page of HTML says of a result file, beside the drawings: one line each. Needs no matplotlib."""

from __future__ import annotations

import html
from collections.abc import Iterable

from perf import report
from perf.results import Result
from perf.study import Study


def section(result: Result | Study) -> str:
    """The command, the machine and the numbers of a file."""
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    head = (
        f"<p><code>{html.escape(result.command)}</code>, {result.started:%Y-%m-%d %H:%M} UTC<br>{html.escape(machine)}"
    )
    if isinstance(result, Study):
        return (
            f"<h2>{html.escape(result.name)}</h2>{head}{_table(('', ''), ((it.what, it.value) for it in result.facts))}"
        )
    grids = (f"<h3>{html.escape(it.title)}</h3>{_table(it.head, it.rows)}" for it in report.grids(result))
    return f"<h2>systems compared</h2>{head}{''.join(grids)}"


def between(page: str, name: str, text: str) -> str:
    """A page with one section replaced, by its heading. Raises ValueError for a page without it."""
    heading = f"<h2>{html.escape(name)}</h2>"
    before, found, rest = page.partition(heading)
    if not found:
        raise ValueError(f"expected {heading}")
    old, newline, after = rest.partition("\n")
    tail = "</html>" if old.endswith("</html>") else ""
    return f"{before}{text}{tail}{newline}{after}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}" for line in lines) + "</table>"
