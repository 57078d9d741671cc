"""The jobs that this node is told about: how fresh each is, and how long it is kept. No input or output.

An interest is *fresh* as long as the cluster answered since the last notice and the connection held; otherwise it is
stale since then, and asked for again. Notices are only hints and come in storms, one an instance: the first is
followed at once, the others together once ``HINT_QUIET`` has passed since the last question.

A question that was not answered is repeated after a pause that doubles up to the refresh interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HINT_QUIET: Final = 0.1
"""Seconds. A storm of notices about a job costs ten questions a second; the last change is seen 0.1 s late at worst."""


@dataclass
class Interest:
    """One job. Times are those of the session's clock; ``stale_since`` is None while it is fresh."""

    job: str
    used_at: float
    stale_since: float | None
    asked_at: float = float("-inf")
    again: bool = False
    """A notice came after the question was sent: the answer may be older than the notice."""
    leaving: bool = False
    """To be given up when the question under way is answered."""
    failures: int = 0

    def use(self, now: float) -> None:
        """Somebody needs the job: it stays."""
        self.used_at = now
        self.leaving = False

    def age(self, now: float) -> None:
        """What is known may be outdated from now on, if it is not already."""
        if self.stale_since is None:
            self.stale_since = now

    def refreshed(self, now: float) -> None:
        """The cluster answered."""
        self.stale_since = now if self.again else None
        self.failures = 0

    def failed(self, now: float) -> None:
        """The cluster did not answer: without it, nothing is given up."""
        self.age(now)
        self.failures += 1
        self.leaving = self.again = False

    def pause(self, first: float, longest: float) -> float:
        """Seconds until the next attempt after a failure."""
        return float(min(longest, first * 2 ** min(self.failures - 1, 16)))
