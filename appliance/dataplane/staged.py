"""The worker's loop once more, with its stages called from Python: a profiler that reads Python's frames sees them.

In ``worker.work`` all time is one frame. While the supervisor sets the word ``STAGED`` (``appliance profile worker``),
``work`` gives way to ``drive``, which calls it for one stage at a time, each from a Python function of its name. It is
the same compiled code on the same memory, in the same order; a turn costs some microseconds more. What a worker may do
does not change: nothing is compiled, imported or opened then.
"""

from __future__ import annotations

from typing import Any

from appliance.dataplane import worker
from appliance.dataplane.memory import STAGED, STOP


def forward(record: Any, control: Any) -> None:
    """Forward packets until the supervisor sets the stop word. ``record``: an array of one worker's record."""
    while True:
        worker.work(record)
        if control[STOP]:
            return
        drive(record, control)


def drive(record: Any, control: Any) -> None:
    """Forward packets as long as the stages are to be called from here."""
    state = record[0]["state"][0]
    state["ready"], state["again"] = worker.EVERYTHING, 0
    while control[STAGED] and not control[STOP]:
        upkeep(record, state)
        outbound(record, state)
        inbound(record, state)
        handed(record, state)
        wait(record, state)
    state["todo"] = 0


def upkeep(record: Any, state: Any) -> None:
    """What begins a turn: the time, the tables' epoch, flows and fragments that are over."""
    state["todo"] = worker.UPKEEP
    worker.work(record)


def outbound(record: Any, state: Any) -> None:
    """From the TUN to the wire: read, decide, rewrite, cut, send."""
    state["todo"] = worker.OUTBOUND
    worker.work(record)


def inbound(record: Any, state: Any) -> None:
    """From the wire to the TUN: receive, decide, rewrite, join, write."""
    state["todo"] = worker.INBOUND
    worker.work(record)


def handed(record: Any, state: Any) -> None:
    """What siblings passed on."""
    state["todo"] = worker.HANDED
    worker.work(record)


def wait(record: Any, state: Any) -> None:
    """What else is ready; asleep, for lack of work."""
    state["todo"] = worker.WAIT
    worker.work(record)
