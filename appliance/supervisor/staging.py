"""Which workers call their stages from Python, and until when: for a profiler that is about to look at them.

*Owned* by the API, in the supervisor's event loop: a timer a worker, which a new request replaces. A worker looks at
the word once a turn (``dataplane.staged``); its successor, should it die, does so too. Whoever asked and went away
leaves nothing: the timer clears the word.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from appliance.dataplane import memory
from appliance.supervisor.errors import StartError
from appliance.supervisor.workers import Worker, WorkerPool

SECONDS_MAX: Final = 600.0


class StageRequest(BaseModel):
    """Which worker, and for how long."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    worker: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(gt=0, le=SECONDS_MAX)]


class Staging:
    """See the module."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def stage(self, wanted: StageRequest) -> int:
        """Have a worker call its stages one by one for a while; its process. Raises StartError if it has none."""
        found = [it for it in self._pool.workers if it.index == wanted.worker and it.pid]
        if not found:
            numbers = ", ".join(str(it.index) for it in self._pool.workers if it.pid)
            raise StartError(f"worker: expected one that runs ({numbers}), got {wanted.worker}")
        (worker,) = found
        if (timer := self._timers.pop(worker.index, None)) is not None:
            timer.cancel()
        worker.control[memory.STAGED] = 1
        self._timers[worker.index] = asyncio.get_running_loop().call_later(wanted.seconds, self._end, worker)
        return worker.pid

    def _end(self, worker: Worker) -> None:
        worker.control[memory.STAGED] = 0
        del self._timers[worker.index]
