"""Saves what is known, some time after it changed, in a thread: a disk may take its time, or be full.

A failure is counted and logged, and costs only that what was kept stays old; the next change tries again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from appliance.cluster.messages import ClusterNode, TableQueryResult
from appliance.cluster.store import Store

log = logging.getLogger(__name__)

DELAY: Final = 1.0
"""Seconds from a change to its file; changes in between share it."""
SHARE: Final = 10
"""How many times as long as a save took the next one waits: it has the event loop's processor, too."""


class Keeper:
    """See the module. ``answers`` and ``nodes`` are what is to be kept at the time of saving."""

    def __init__(
        self,
        store: Store,
        answers: Callable[[], Iterable[TableQueryResult]],
        nodes: Mapping[str, ClusterNode],
    ) -> None:
        self.failures = 0
        self._store = store
        self._answers = answers
        self._nodes = nodes
        self._changed = asyncio.Event()

    def change(self) -> None:
        """There is something new to keep."""
        self._changed.set()

    async def run(self) -> None:
        """Saves changes until cancelled."""
        pause = DELAY
        while True:
            await self._changed.wait()
            await asyncio.sleep(pause)
            began = time.monotonic()
            await self.flush()
            pause = max(DELAY, SHARE * (time.monotonic() - began))

    async def flush(self) -> None:
        """Saves what has changed since the last time."""
        if self._changed.is_set():
            self._changed.clear()
            answers, nodes = list(self._answers()), dict(self._nodes)
            await self.attempt(lambda: self._store.save_tables(answers, nodes))

    async def attempt(self, save: Callable[[], None]) -> None:
        """Saves in a thread."""
        try:
            await asyncio.to_thread(save)
        except OSError as error:
            self.failures += 1
            log.warning("cannot keep what the cluster said", extra={"error": str(error)})
