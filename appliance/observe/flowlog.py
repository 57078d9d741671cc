"""Which flows began and ended between two looks at the workers' tables, as records of the flow log.

Theory of operation
-------------------
The packet path writes nothing for the log: what it keeps of a flow anyway is read here, from shared memory, while the
workers write it. A ``Tracker`` a worker holds a copy of the flows that it saw last, and compares. Everything here takes
arrays and times, and gives records; ``supervisor.flowlog`` looks, waits and writes.

A flow is its record's number, its key (``KEY``), the instance that it leads to, and counts that never fall, and grow
with each packet: what the packet path makes anew in the same record, as the instance is gone or a closed connection is
opened again, is another flow, unless it has outgrown the one before at the first look that sees it. A record that was
freed keeps its counts until it is used again, so that those of an ended flow are nearly always final; else they are
those of the last look. What began and ended between two looks is ``missed``; as the shortest time that a flow rests
before it is removed is ``limits.TCP_CLOSING``, that happens where the table is full, where instances go, and where a
port is used again at once.

A flow began when its first look saw its last packet, and ended with its last packet: the first is late by up to the
time between two looks, the second is exact. Of a flow that was there at the first look the beginning is unknown.

Limits: ``NAMES_MAX`` names are remembered, for flows that outlive their instance or service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np

from appliance import limits
from appliance.dataplane import flow
from appliance.observe import counters
from appliance.observe.flows import describe
from appliance.tables import layout
from appliance.tables.layout import IPAddress

KEY: Final = ("local_hi", "local_lo", "dialled_hi", "dialled_lo", "local_port", "remote_port", "protocol")
INSTANCE: Final = ("target_hi", "target_lo", "generation")
COUNTS: Final = ("packets_out", "packets_in", "bytes_out", "bytes_in")
NAMES_MAX: Final = 65_536
BURST_S: Final = 2
"""Seconds' worth of records that may come at once."""
_NS: Final = 1_000_000_000
_OPENED: Final = counters.COUNTS + counters.Count.FLOWS_OPENED
_SERVICE: Final = -1  # in place of a generation, in the names of ServiceIPs

Name = Callable[[IPAddress], str]


@dataclass(frozen=True)
class Seen:
    """What changed in one worker's table: rows of ``flow.FLOW``.

    Of the ended ones ``since`` and ``last`` are the times of their first and last packet, CLOCK_MONOTONIC nanoseconds,
    ``is_known`` says whether ``since`` is, and ``closed`` and ``idle`` why they ended, if they did by themselves.
    """

    began: Any
    ended: Any
    since: Any
    last: Any
    is_known: Any
    closed: Any
    idle: Any
    missed: int


class Tracker:
    """The flows of one worker, as they were seen last."""

    def __init__(self) -> None:
        self._numbers = np.empty(0, np.int64)
        self._rows = np.empty(0, flow.FLOW)
        self._since = np.empty(0, np.int64)
        self._is_known = np.empty(0, np.bool_)
        self._accounted: int | None = None

    def look(self, records: Any, words: Any, now: int) -> Seen:
        """What has changed since the last look; nothing has at the first one.

        ``words``: the worker's counters. ``now``: CLOCK_MONOTONIC nanoseconds.
        """
        is_first, opened = self._accounted is None, int(words[_OPENED])
        numbers = np.flatnonzero(records["state"])
        rows = records[numbers]
        _, was, here = np.intersect1d(self._numbers, numbers, assume_unique=True, return_indices=True)
        stays = _is_same(self._rows[was], rows[here])
        was, here = was[stays], here[stays]
        is_new, is_gone = _others(len(numbers), here), _others(len(self._numbers), was)
        since, is_known = _last_packet(rows, rows["state"]), np.full(len(rows), not is_first)
        since[here], is_known[here] = self._since[was], self._is_known[was]
        began = rows[is_new & is_known]
        seen = self._seen(records, is_gone, now, began, self._newly_missed(len(began), opened, words))
        self._numbers, self._rows, self._since, self._is_known = numbers, rows, since, is_known
        return seen

    def _seen(self, records: Any, is_gone: Any, now: int, began: Any, missed: int) -> Seen:
        before = self._rows[is_gone]
        rows = _final(before, records[self._numbers[is_gone]])
        return Seen(
            began=began,
            ended=rows,
            since=self._since[is_gone],
            last=_last_packet(rows, before["state"]),
            is_known=self._is_known[is_gone],
            closed=before["state"] == flow.CLOSING,
            idle=rows["deadline"] <= now,
            missed=missed,
        )

    def _newly_missed(self, began: int, opened: int, words: Any) -> int:
        """Flows that were opened and not seen. Never one that is seen later: flows are counted before the records are
        read, but for those that were there at the first look."""
        if self._accounted is None:
            self._accounted = int(words[_OPENED])
            return 0
        self._accounted += began
        missed = max(0, opened - self._accounted)
        self._accounted += missed
        return missed


def _others(count: int, chosen: Any) -> Any:
    """Which of so many are not chosen."""
    others = np.ones(count, np.bool_)
    others[chosen] = False
    return others


def _is_same(before: Any, after: Any) -> Any:
    """Which of these pairs of rows are of the same flow: a packet is counted before it moves the deadline."""
    same = np.ones(len(before), np.bool_)
    is_at_rest = np.ones(len(before), np.bool_)
    for name in (*KEY, *INSTANCE):
        same &= before[name] == after[name]
    for name in COUNTS:
        same &= before[name] <= after[name]
        is_at_rest &= before[name] == after[name]
    return same & (~is_at_rest | (before["deadline"] == after["deadline"]))


def _final(before: Any, after: Any) -> Any:
    """The rows as they are in their records still, where those have not been used again."""
    rows, is_there = before.copy(), _is_same(before, after)
    rows[is_there] = after[is_there]
    return rows


def _last_packet(rows: Any, states: Any) -> Any:
    """When each flow's last packet passed, CLOCK_MONOTONIC nanoseconds: ``flow.touch`` backwards."""
    is_tcp, is_icmp = rows["protocol"] == flow.TCP, np.isin(rows["protocol"], (flow.ICMP, flow.ICMP6))
    rest = np.select(
        [
            is_tcp & (states == flow.OPENING), is_tcp & (states == flow.CLOSING), is_tcp, is_icmp,
            states == flow.ANSWERED,
        ],
        [
            limits.TCP_OPENING, limits.TCP_CLOSING, limits.TCP_ESTABLISHED, limits.ICMP_TIMEOUT, limits.UDP_ANSWERED,
        ],
        limits.UDP_UNANSWERED,
    )  # fmt: skip
    return rows["deadline"] - rest


def sampled(rows: Any, one_in: int) -> Any:
    """Which rows are logged if one flow in so many is. It is their key that decides: beginning and end agree."""
    if one_in == 1:
        return np.ones(len(rows), np.bool_)
    h = np.zeros(len(rows), np.uint64)
    for name in KEY:
        h = (h ^ rows[name].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(29)
    return h % np.uint64(one_in) == 0


@dataclass
class Allowance:
    """Records that may be written: ``rate`` a second, and what was saved up in ``BURST_S``. Times are seconds."""

    rate: int
    since: float
    left: float = 0.0

    def take(self, wanted: int, now: float) -> int:
        """How many of so many may be written now."""
        self.left = min(self.rate * float(BURST_S), self.left + (now - self.since) * self.rate)
        self.since = now
        given = min(wanted, int(self.left))
        self.left -= given
        return given


def spread(count: int, chosen: int) -> Any:
    """So many indices of ``count`` rows, evenly: no worker's flows before another's."""
    return np.arange(chosen) * count // max(chosen, 1)


class Describer:
    """Rows as records. ``owner`` gives the instance at a namespace address, ``service`` the job of a ServiceIP, each ""
    if there is none. What a flow had when it began, it has when it ends."""

    def __init__(self, node: str, owner: Name, service: Name) -> None:
        self.node = node
        self._owner, self._service = owner, service
        self._names: dict[tuple[int, int, int], str] = {}

    def began(self, worker: int, row: Any, wall: float) -> dict[str, Any]:
        """The record of a flow that began. ``wall``: Unix time."""
        return {"time": when(wall), "event": "start", **self._flow(worker, row)}

    def ended(self, worker: int, seen: Seen, number: int, wall: float, now: int) -> dict[str, Any]:
        """The record of the flow ``seen.ended[number]``. ``wall`` and ``now`` are the same moment."""
        row, since, last = seen.ended[number], int(seen.since[number]), int(seen.last[number])
        known = bool(seen.is_known[number])
        return {
            "time": when(wall - (now - last) / _NS),
            "event": "end",
            "reason": "closed" if seen.closed[number] else "idle" if seen.idle[number] else "removed",
            "start": when(wall - (now - since) / _NS) if known else None,
            "duration": round(max(0, last - since) / _NS, 3) if known else None,
            **self._flow(worker, row),
            **{name: int(row[name]) for name in COUNTS},
        }

    def _flow(self, worker: int, row: Any) -> dict[str, Any]:
        it = describe(worker, row)
        return {
            "node": self.node,
            "worker": worker,
            "protocol": it["protocol"],
            "source": it["local"],
            "source_port": it["local_port"],
            "destination": it["dialled"],
            "destination_port": it["remote_port"],
            "target": it["target"],
            "target_node": it["node"],
            "client": self._name(self._owner, row, "local", int(row["local_generation"])),
            "service": self._name(self._service, row, "dialled", _SERVICE),
            "instance": self._name(self._owner, row, "target", int(row["generation"])),
        }

    def _name(self, name: Name, row: Any, side: str, generation: int) -> str:
        hi, lo = int(row[f"{side}_hi"]), int(row[f"{side}_lo"])
        known = self._names.get((hi, lo, generation)) or name(layout.address(hi, lo))
        if known:
            if len(self._names) >= NAMES_MAX:
                self._names.clear()
            self._names[hi, lo, generation] = known
        return known


def when(wall: float) -> str:
    """A time as RFC 3339 has it, in milliseconds. ``wall``: Unix time."""
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
