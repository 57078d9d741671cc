"""The worker's loop once more, with its stages called from Python: a profiler that reads Python's frames sees them.

In ``worker.work`` all time is one frame. While the supervisor sets the word ``STAGED`` (``appliance profile worker``),
``work`` gives way to ``drive``, which calls the same compiled functions in the same order, each from a Python function
of its name. A turn costs some microseconds more; flows, tables and what waits stay where they are. What a worker may
do does not change: nothing is compiled, imported or opened then (``compile_stages`` has done so in the template).
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
        drive(record[0], control)


def drive(w: Any, control: Any) -> None:
    """Forward packets as long as the stages are to be called from here."""
    ready = worker.EVERYTHING
    while control[STAGED] and not control[STOP]:
        upkeep(w)
        again = 0
        if ready & worker.TUN_READY:
            again |= outbound(w)
        if ready & worker.WIRE_READY:
            again |= inbound(w)
        if ready & worker.HANDED_READY:
            again |= handed(w)
        settle(w)
        ready = look(w, again) if again else wait(w)


def compile_stages(w: Any) -> None:
    """Have all stages compiled, or loaded: each is called once, on a record whose descriptors are none."""
    upkeep(w)
    for turn in (outbound, inbound, handed):
        turn(w)
    settle(w)
    look(w, 0)
    wait(w)


def upkeep(w: Any) -> None:
    """What begins a batch: the time, the tables' epoch, flows and fragments that are over."""
    worker.begin_batch(w)


def outbound(w: Any) -> int:
    """From the TUN to the wire: read, decide, rewrite, cut, send."""
    return int(worker.outbound_turn(w))


def inbound(w: Any) -> int:
    """From the wire to the TUN: receive, decide, rewrite, join, write."""
    return int(worker.inbound_turn(w))


def handed(w: Any) -> int:
    """What siblings passed on."""
    return int(worker.handed_turn(w))


def settle(w: Any) -> None:
    """Packets whose address is known by now."""
    worker.end_batch(w)


def look(w: Any, again: int) -> int:
    """What else is ready, while there is work."""
    return int(worker.look(w, again))


def wait(w: Any) -> int:
    """Asleep, for lack of work."""
    return int(worker.wait(w))
