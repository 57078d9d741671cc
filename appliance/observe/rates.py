"""What happened between two looks at a node's status, a second. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from appliance.observe.meanings import totals

_PATHS: Final = (("tun", "from container"), ("sent", "to node"), ("wire", "from node"), ("written", "to container"))
_CALLS: Final = ("tun_reads", "wire_reads", "sent_calls", "written_calls")

Status = Mapping[str, Any]


def rates(before: Status, after: Status, seconds: float) -> dict[str, Any]:
    """Rates of each worker, and of drops by direction and reason.

    ``seconds``: between the two looks, more than 0. A counter that fell was begun anew, and counts from zero.
    """
    was = {worker["index"]: worker for worker in before["workers"]}
    workers = [_worker(was.get(it["index"], _NOTHING), it, seconds) for it in after["workers"]]
    return {"seconds": round(seconds, 3), "workers": workers, "drops": _drops(before, after, seconds)}


def _worker(before: Mapping[str, Any], after: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    def rate(*names: str) -> float:
        grown = (_grown(before["counters"].get(name, 0), after["counters"].get(name, 0)) for name in names)
        return sum(grown) / seconds

    row: dict[str, Any] = {"worker": after["index"], "cpu": after["cpu"], "flows": after["counters"]["flows_live"]}
    for stage, path in _PATHS:
        row[f"{path} packets"] = round(rate(f"{stage}_packets"))
        row[f"{path} Mbit"] = round(rate(f"{stage}_bytes") * 8 / 1e6, 1)
    return {**row, "new flows": round(rate("flows_opened")), "system calls": round(rate(*_CALLS, "waits"))}


def _drops(before: Status, after: Status, seconds: float) -> Sequence[dict[str, Any]]:
    was = {(it["direction"], it["reason"]): it["packets"] for it in totals(before["workers"])}
    rows = []
    for row in totals(after["workers"]):
        grown = _grown(was.get((row["direction"], row["reason"]), 0), row["packets"])
        if grown:
            rows.append({**row, "packets": round(grown / seconds, 1)})
    return sorted(rows, key=lambda it: -it["packets"])


def _grown(before: int, after: int) -> int:
    return after - before if after >= before else after


_NOTHING: Final[Mapping[str, Any]] = {"counters": {}, "drops": {}}
