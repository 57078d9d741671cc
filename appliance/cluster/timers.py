"""Deadlines by name, for a session that is told the time: at most one a name, set again as often as needed."""

from __future__ import annotations

import heapq
from typing import NamedTuple


class Timer(NamedTuple):
    """What a deadline is for."""

    kind: str
    key: str = ""


class Timers:
    """A heap of deadlines; those that were set again or cancelled stay in it until they come up."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, Timer]] = []
        self._when: dict[Timer, float] = {}

    def set(self, timer: Timer, when: float) -> None:
        """Lets a timer end at ``when``, instead of whenever it would have."""
        self._when[timer] = when
        heapq.heappush(self._heap, (when, timer))

    def cancel(self, timer: Timer) -> None:
        """Lets a timer never end; it need not be set."""
        self._when.pop(timer, None)

    def next(self) -> float | None:
        """When the next timer ends."""
        while self._heap and self._when.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[Timer]:
        """The timers that have ended, each once, in order."""
        ended = []
        while (when := self.next()) is not None and when <= now:
            _, timer = heapq.heappop(self._heap)
            del self._when[timer]
            ended.append(timer)
        return ended
