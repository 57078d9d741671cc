"""Instances that drain before they are removed: a timer each.

*Owns* the timers, in the manager's event loop. An instance's document says that it leaves, and after how many seconds;
the time runs from when this manager sees that, so no clock is compared with another's, and a manager that is restarted
gives an instance its time again. Of several managers the first removes it, which the others then see. One that is
wanted again meanwhile stays. A service that was undeployed goes with its last instance. What cannot be written is tried
again after ``AGAIN_S``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from appliance.cluster.manager import services
from appliance.cluster.manager.decide import Decision
from appliance.cluster.manager.documents import Document, Instance
from appliance.cluster.manager.store import Store, UnavailableError

log = logging.getLogger(__name__)

AGAIN_S = 1.0
Do = Callable[[Decision], Awaitable[object]]


class Leaving:
    """See the module."""

    def __init__(self, store: Store, do: Do) -> None:
        self._store = store
        self._do = do
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def changed(self, key: str, before: Document | None, after: Document | None) -> None:
        """A document has changed."""
        seconds = [it.leaving_s if isinstance(it, Instance) else 0.0 for it in (before, after)]
        if seconds[0] != seconds[1]:
            self._set(key, seconds[1])

    def reloaded(self) -> None:
        """All documents were read anew."""
        state = self._store.state
        for job in state.jobs():
            document, numbers = state.job(job), state.numbers(job)
            if document is not None and document.leaving and not numbers:  # somebody stopped in the middle of it
                self._set(f"instance.{job}.0", AGAIN_S)
            for number in numbers:
                instance = state.instance(job, number)
                if instance is not None and instance.leaving_s:
                    self._set(f"instance.{job}.{number}", instance.leaving_s)

    def stop(self) -> None:
        """Ends the timers; what leaves is found again at the next start."""
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()

    def _set(self, key: str, seconds: float) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if seconds:
            self._timers[key] = asyncio.get_running_loop().call_later(seconds, self._due, key)

    def _due(self, key: str) -> None:
        del self._timers[key]
        task = asyncio.ensure_future(self._remove(key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _remove(self, key: str) -> None:
        job, _, number = key.removeprefix("instance.").rpartition(".")
        try:
            await self._do(partial(services.leave, job, int(number)))
        except UnavailableError as error:
            log.warning("drained, but not removed yet", extra={"instance": key, "error": error})
            self._set(key, AGAIN_S)
