"""What others do to the node, noticed and answered: containers that go, damage to our part, another uplink.

Theory of operation
-------------------
*Owns* the watcher of the kernel (``environment.watch``) and a task for each thing that is being done about what it
reports; *runs* in the supervisor's event loop.

- A container whose link is gone is withdrawn from the cluster at once (``gone``).
- One whose link is impaired is only counted and named: its addresses are still its own, and nobody but its runtime
  knows whether it comes back.
- Damage to the bridge, to its addresses or to our routes is repaired. One repair runs at a time; what is reported
  meanwhile makes it look again. One that fails is repeated after ``RETRY_FIRST_S``, twice as long each time up to
  ``RETRY_LONGEST_S``, until it succeeds: the kernel tells of changes, not of obstacles that went away.
- If links, addresses or routes of the underlay changed, ``uplink_changed`` finds out what that means. One runs at a
  time; a report meanwhile makes it run once more.

Everything is counted. What fails is logged, and costs nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from appliance.environment.attachment import Attachment
from appliance.environment.errors import EnvironmentError_
from appliance.environment.manager import EnvironmentManager
from appliance.environment.watch import Callbacks, Watcher
from appliance.tasks import end

log = logging.getLogger(__name__)

RETRY_FIRST_S: Final = 0.5
RETRY_LONGEST_S: Final = 30.0

Gone = Callable[[Attachment], Awaitable[None]]
Changed = Callable[[], Awaitable[None]]


class Upkeep:
    """See the module."""

    def __init__(self, environment: EnvironmentManager, gone: Gone, uplink_changed: Changed) -> None:
        self.counters: Counter[str] = Counter()
        self.last_error = ""
        self._environment = environment
        self._gone = gone
        self._impaired: dict[str, str] = {}  # an attachment's link → the instance
        self._repair = Repeated(self._converge, self._spawn)
        self._move = Repeated(uplink_changed, self._spawn)
        self._tasks: set[asyncio.Task[None]] = set()
        self._watcher = Watcher(
            environment,
            Callbacks(self._on_gone, self._on_impaired, self._on_restored, self._on_damaged, self._on_uplink_changed),
        )

    async def start(self) -> None:
        """Begin in the calling thread's namespace. Raises OSError or EnvironmentError_."""
        await self._watcher.start()

    async def stop(self) -> None:
        """End; what is under way is given up. To be called before the environment goes, or the TUN is closed."""
        await self._watcher.stop()
        await end(self._tasks)

    def status(self) -> dict[str, Any]:
        """What operators see."""
        return {
            **{name: self.counters[name] for name in _COUNTED},
            "events_lost": self._watcher.overruns,
            "impaired_now": sorted(self._impaired.values()),
            "last_error": self.last_error,
        }

    # --- What the watcher reports --------------------------------------------------------------------------------

    def _on_gone(self, attachment: Attachment) -> None:
        self.counters["gone"] += 1
        self._impaired.pop(attachment.veth, None)
        self._spawn("withdrawal", self._gone(attachment))

    def _on_impaired(self, attachment: Attachment) -> None:
        self.counters["impaired"] += 1
        self._impaired[attachment.veth] = _name(attachment)
        log.warning("a container's link passes no packets", extra={"instance": _name(attachment)})

    def _on_restored(self, attachment: Attachment) -> None:
        self.counters["restored"] += 1
        self._impaired.pop(attachment.veth, None)
        log.info("a container's link passes packets again", extra={"instance": _name(attachment)})

    def _on_damaged(self) -> None:
        self.counters["damaged"] += 1
        log.warning("bridge, addresses or routes were changed by somebody else, repairing")
        self._repair.ask("repair")

    def _on_uplink_changed(self) -> None:
        self.counters["uplink_changed"] += 1
        self._move.ask("uplink")

    # --- What is done about it -----------------------------------------------------------------------------------

    async def _converge(self) -> None:
        pause = RETRY_FIRST_S
        while True:
            try:
                await self._environment.converge()
            except EnvironmentError_ as error:
                self.counters["repairs_failed"] += 1
                self.last_error = f"repair: {error}"
                log.error("repair failed, trying again", extra={"error": str(error), "pause_s": pause})
            else:
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_LONGEST_S)
        self.counters["repaired"] += 1
        self.last_error = ""
        log.info("repaired")

    def _spawn(self, name: str, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.create_task(_completed(work), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.last_error = f"{task.get_name()}: {error}"
            log.error("ended", extra={"task": task.get_name()}, exc_info=error)


class Repeated:
    """Work of which one runs at a time, and once more if it was asked for meanwhile."""

    def __init__(
        self, work: Changed, spawn: Callable[[str, Coroutine[Any, Any, None]], asyncio.Task[None]]
    ) -> None:
        self._work = work
        self._spawn = spawn
        self._asked = False
        self._task: asyncio.Task[None] | None = None

    def ask(self, name: str) -> None:
        """Have it done after this, whatever is under way."""
        self._asked = True
        if self._task is None or self._task.done():
            self._task = self._spawn(name, self._run())

    async def _run(self) -> None:
        while self._asked:
            self._asked = False
            await self._work()


_COUNTED: Final = ("gone", "impaired", "restored", "damaged", "repaired", "repairs_failed", "uplink_changed")


def _name(attachment: Attachment) -> str:
    return f"{attachment.service}.{attachment.instance}"


async def _completed(work: Awaitable[None]) -> None:
    await work
