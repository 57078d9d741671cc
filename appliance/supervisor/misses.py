"""Addresses that a worker's tables lack: asked for once, answered once.

Theory of operation
-------------------
*Owns* one task an address that is being asked for. *Called* in the supervisor's event loop, by the workers' rings
(``missed``), as often as packets to such an address arrive; while the question is open, nothing more happens.

Every address that was missed is answered: the tables have it now, or nobody does, or nobody could be asked. Of more
than ``OPEN_MAX`` at a time, which only a scan of the address range makes, the rest is answered with no at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from appliance.tables.layout import IPAddress
from appliance.tasks import end

log = logging.getLogger(__name__)

OPEN_MAX: Final = 1_024
"""Questions at a time. A cluster answers one in some milliseconds, so a node's real services never get near."""

Resolve = Callable[[IPAddress], Awaitable[bool]]
Answered = Callable[[IPAddress, bool], None]


class Misses:
    """See the module. ``resolve`` asks, ``answered`` is told the outcome."""

    def __init__(self, resolve: Resolve, answered: Answered) -> None:
        self.counters: Counter[str] = Counter()
        self._resolve = resolve
        self._answered = answered
        self._open: dict[IPAddress, asyncio.Task[None]] = {}

    def missed(self, address: IPAddress) -> None:
        """A packet to an unknown address."""
        if address in self._open:
            return
        self.counters["missed"] += 1
        if len(self._open) >= OPEN_MAX:
            self.counters["not_asked"] += 1
            self._answered(address, False)
            return
        self._open[address] = asyncio.create_task(self._ask(address), name=f"miss {address}")

    async def stop(self) -> None:
        """Asks no more; what is open is not answered."""
        tasks = list(self._open.values())
        await end(tasks)

    async def _ask(self, address: IPAddress) -> None:
        found = False
        try:
            found = await self._resolve(address)
        except Exception:
            log.exception("an address could not be asked for", extra={"address": str(address)})
        finally:
            del self._open[address]
        self.counters["found" if found else "not_found"] += 1
        self._answered(address, found)
