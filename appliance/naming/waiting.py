"""Questions that wait for the cluster. Pure.

*Owned* by the responder. Whoever asks for something that is unknown waits here, at most ``wait`` seconds; who asks the
same joins, so that the cluster is asked once. What the cluster did not know, or could not be asked for, is
remembered for a while, so that a program that asks again and again does not wait, or ask, each time.

At most `KEYS_MAX` keys wait, with `CALLERS_MAX` callers each; one more is told at once that there is no answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

KEYS_MAX: Final = 1024
CALLERS_MAX: Final = 256
REMEMBERED_MAX: Final = 8192
UNREACHABLE_S: Final = 1.0
"""Time in which a cluster that gave no answer is not asked for the same again."""


class Verdict(Enum):
    """How a question to the cluster ended."""

    FOUND = "found"
    ABSENT = "absent"
    NO_ANSWER = "no answer"


Caller = Callable[[Verdict], None]


@dataclass(slots=True)
class _Open:
    deadline: float
    callers: list[Caller] = field(default_factory=list)


class Waiting:
    """See the module. ``ask`` is called with each key that the cluster is to be asked for. Times are seconds."""

    def __init__(self, ask: Callable[[str], None], wait: float, remember: float) -> None:
        self.wait = wait
        self.remember = remember
        self._ask = ask
        self._open: dict[str, _Open] = {}
        self._ended: OrderedDict[str, tuple[Verdict, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def join(self, key: str, caller: Caller, now: float) -> Verdict | None:
        """Waits for a key. A verdict, if there is one already; the caller then hears nothing more."""
        ended = self._ended.get(key)
        if ended is not None and now < ended[1]:
            return ended[0]
        waiting = self._open.get(key)
        if waiting is None:
            if len(self._open) >= KEYS_MAX:
                return Verdict.NO_ANSWER
            waiting = self._open[key] = _Open(now + self.wait)
            self._ask(key)
        if len(waiting.callers) >= CALLERS_MAX:
            return Verdict.NO_ANSWER
        waiting.callers.append(caller)
        return None

    def end(self, key: str, verdict: Verdict, now: float) -> None:
        """Tells everybody who waits for a key; nothing if nobody does."""
        waiting = self._open.pop(key, None)
        if verdict is not Verdict.FOUND:
            self._remember(key, verdict, now)
        for caller in waiting.callers if waiting else ():
            caller(verdict)

    def _remember(self, key: str, verdict: Verdict, now: float) -> None:
        lasts = self.remember if verdict is Verdict.ABSENT else UNREACHABLE_S
        self._ended[key] = verdict, now + lasts
        self._ended.move_to_end(key)
        if len(self._ended) > REMEMBERED_MAX:
            self._ended.popitem(last=False)

    def learned(self, key: str, now: float) -> None:
        """A key became known without an answer to a question for it."""
        self._ended.pop(key, None)
        if key in self._open:
            self.end(key, Verdict.FOUND, now)

    def expire(self, now: float) -> None:
        """Ends what has waited long enough."""
        for key in [key for key, it in self._open.items() if it.deadline <= now]:
            self.end(key, Verdict.NO_ANSWER, now)

    def deadline(self) -> float | None:
        """When ``expire`` has something to do: the first that began ends first."""
        return min((it.deadline for it in self._open.values()), default=None)
