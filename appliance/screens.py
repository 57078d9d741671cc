"""The local API's answers as tables for a terminal.

Columns and rows are taken from the data, so that a counter or a field that the API gains is shown without a
change here.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from appliance.observe.meanings import DIRECTIONS, totals

DROPS_SHOWN = 5
"""Reasons for drops that ``status`` shows."""
SAMPLED = ("turns", "packets")
"""Beside the stages' nanoseconds: what they are of."""
PIPE_WIDTH = 250
"""Columns where the output is no terminal: nothing is cut that a following grep may look for."""


def show(screen: RenderableType) -> None:
    """Prints to standard output; with styles and the terminal's width if it is one. Text is never markup."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width, highlight=False, markup=False, emoji=False).print(screen)


def status(data: Mapping[str, Any], counters: bool = False) -> RenderableType:
    """One screen: is it well, node, cluster, tables, offloads, workers; and with ``counters`` all that they counted."""
    workers: Sequence[Mapping[str, Any]] = data["workers"]
    parts: list[RenderableType] = [Text(verdict(data), style="bold")]
    parts += [_facts(title, data[title]) for title in ("node", "cluster", "tables", "offloads") if data.get(title)]
    parts.append(table("workers", map(_worker, workers)))
    if counters:
        named = ("naming", "upkeep", "firewall", "exposed", "checks", "flow_log")
        parts += [_facts(title, data[title]) for title in named if isinstance(data.get(title), Mapping)]
        return Group(*parts, _stages(workers), _counters(workers))
    return Group(*parts, drops(totals(workers)[:DROPS_SHOWN]), *_errors(data))


def verdict(data: Mapping[str, Any]) -> str:
    """Whether the node is well, in a line; what it lacks otherwise."""
    refused = data.get("reload", {}).get("last_error", "")
    reload = f"; the last reload was refused: {refused.splitlines()[0]}" if refused else ""
    if data.get("ill"):
        return "not healthy: " + "; ".join(data["ill"]) + reload
    if data.get("not_ready"):
        return "not ready: " + "; ".join(data["not_ready"]) + reload
    return "healthy, ready" + reload


def _errors(data: Mapping[str, Any]) -> Iterable[RenderableType]:
    """The last error of each part that had one."""
    parts = [(title, data.get(title) or {}) for title in ("node", "cluster", "naming", "upkeep", "flow_log")]
    found = [{"part": title, "last error": part["last_error"]} for title, part in parts if part.get("last_error")]
    return [table("errors", found)] if found else []


def drops(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Drops by direction and reason, most first, each with what it means."""
    return table("drops", ({**row, "direction": DIRECTIONS.get(row["direction"], row["direction"])} for row in rows))


def top(data: Mapping[str, Any]) -> RenderableType:
    """Rates of the workers and of drops, as ``observe.rates`` gives them."""
    return Group(table("a second", data["workers"]), drops(data["drops"]))


def flows(data: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A line for each flow."""
    return table(f"{len(data)} flows", data)


def attachments(data: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A line for each attached container."""
    return table(f"{len(data)} attachments", data)


def pairs(title: str, data: Mapping[str, Any]) -> RenderableType:
    """`name value` lines under a title; a nested mapping is named `outer.inner`."""
    grid = Table.grid(padding=(0, 2))
    for name, value in _flattened(data):
        grid.add_row(f"  {name}", cell(value))
    return Group(Text(title, style="bold"), grid)


def _flattened(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _facts(title: str, data: Mapping[str, Any]) -> RenderableType:
    """Things that have the same properties as a table with a row each; anything else as lines."""
    if data and all(isinstance(value, Mapping) for value in data.values()):
        return table(title, ({"name": name, **value} for name, value in data.items()))
    return pairs(title, data)


def _worker(worker: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a person reads in a worker's line: no groups of counters, and no raw clock."""
    scalars = {
        name: value for name, value in worker.items() if not isinstance(value, Mapping) and not name.endswith("_ns")
    }
    counted = worker.get("counters", {})
    return {**scalars, "live": counted.get("flows_live", 0), "dropped": _sum(worker.get("drops", {}))}


def _sum(tree: Mapping[str, Any]) -> int:
    return sum(_sum(value) if isinstance(value, Mapping) else value for value in tree.values())


def _stages(workers: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A row for each stage of the packet path, a column for each worker: its share of the time, in percent."""
    timed = {
        f"worker {it['index']}": {name: ns for name, ns in it.get("stages", {}).items() if name not in SAMPLED}
        for it in workers
    }
    names = dict.fromkeys(name for times in timed.values() for name in times)
    rows = (
        {"stage": name}
        | {column: round(100 * times.get(name, 0) / (sum(times.values()) or 1), 1) for column, times in timed.items()}
        for name in names
    )
    return table("time %", rows)


def _counters(workers: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A row for each counter that is not zero everywhere, a column for each worker."""
    counted = [dict(_flattened(worker["counters"] | {"drops": worker["drops"]})) for worker in workers]
    columns = [f"worker {worker['index']}" for worker in workers]
    names = dict.fromkeys(name for counters in counted for name, count in counters.items() if count)
    rows = (
        {"counter": name} | {column: it.get(name, 0) for column, it in zip(columns, counted, strict=True)}
        for name in names
    )
    return table("counted", rows)


def table(title: str, rows: Iterable[Mapping[str, Any]]) -> RenderableType:
    """A table with the union of the rows' keys as columns; numbers to the right."""
    rows = list(rows)
    grid = Table(box=None, pad_edge=False, header_style="dim")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        number = all(isinstance(row.get(name), int | float) for row in rows)
        grid.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(cell(row.get(name)) for name in names))
    return Group(Text(title, style="bold"), grid) if rows else Text(f"{title}: none", style="bold")


def cell(value: object) -> str:
    """A value for a person: yes and no, nothing for null, thousands apart, lists with commas."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") if abs(value) >= 100_000 else str(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def name(data: dict[str, Any]) -> str:
    """Where a name leads: one line for each thing that is known of it."""
    facts = ("name", "from", "status", "why", "key", "ttl")
    lines = [f"{fact} {data[fact]}" for fact in facts if data.get(fact) is not None]
    lines += [f"record {record}" for record in data.get("records", [])]
    for service in data.get("behind", []):
        lines.append(f"service {service['address']} policy {service['policy']} of {', '.join(service['backends'])}")
        lines += _choice(service)
    return "\n".join(lines)


def _choice(service: Mapping[str, Any]) -> Iterable[str]:
    """Who behind a ServiceIP may be next."""
    for it in service.get("instances", []):
        place = "this node" if it["local"] else it["node"]
        who = f"{it['instance'] or '?'} at {it['address']} on {place}"
        yield f"  {who}: {it['state']}, weight {it['weight']}, {it['share']:.0%} of new flows"
    if "next" in service:
        yield f"  next {service['next'] or 'any of these'}: {service['order']}"
