"""Carries out decisions: takes them on a fresh mirror, writes what they want, and again if somebody was faster.

Theory of operation
-------------------
Decisions arrive in a queue and are carried out in groups, one group at a time, in the order of their arrival: the
mirror catches up, every decision of the group is taken with those before it in view, and all their changes are one
transaction. A group costs one write to the disk however many decisions it has, and a manager has no conflicts with
itself. A conflict with another manager repeats the whole group on a newer mirror, after a short random pause.

A decision that refuses changes nothing and does not harm its group. When the broker does not answer, the group is
repeated until its decisions are older than PATIENCE_S; decisions are made so that taking them twice does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NoReturn

from appliance.cluster.manager.decide import Decision, Outcome
from appliance.cluster.manager.documents import Document
from appliance.cluster.manager.state import State
from appliance.cluster.manager.store import BATCH_MAX, ConflictError, Store, UnavailableError

log = logging.getLogger(__name__)

GROUP_MAX = 256
"""Decisions in one transaction: bounds how long the first of them waits for the last."""
PATIENCE_S = 8.0
"""How long a decision waits for the broker: less than the 10 s that a node waits for its subnet."""
PAUSE_S = 0.02
"""Longest random pause after a conflict, times the number of conflicts; two managers then soon take turns."""
DISTRUST = 5
"""Conflicts in a row after which the mirror is made anew, as the revisions in it may be wrong."""
RETRY_S = 0.2
"""Pause after the broker did not answer."""


@dataclass
class _Pending:
    """A decision, and who waits for its outcome."""

    decision: Decision
    done: asyncio.Future[Outcome]
    since: float = field(default_factory=time.monotonic)
    result: Outcome | Exception = field(default_factory=Outcome)

    def finish(self) -> None:
        if self.done.done():
            return
        if isinstance(self.result, Exception):
            self.done.set_exception(self.result)
        else:
            self.done.set_result(self.result)


class Executor:
    """The only writer of a store in this process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: deque[_Pending] = deque()
        self._some = asyncio.Event()
        self.conflicts = 0

    async def submit(self, decision: Decision) -> Outcome:
        """The outcome of a decision once it is written. Raises what the decision raises, and UnavailableError."""
        pending = _Pending(decision, asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        self._some.set()
        return await pending.done

    async def run(self) -> NoReturn:
        """Carries out decisions for ever."""
        while True:
            await self._some.wait()
            group = [self._queue.popleft() for _ in range(min(GROUP_MAX, len(self._queue)))]
            await self._carry_out(group)
            if not self._queue:
                self._some.clear()

    async def _carry_out(self, group: list[_Pending]) -> None:
        conflicts = 0
        while group:
            try:
                decided = await self._attempt(group)
            except ConflictError:
                conflicts += 1
                self.conflicts += 1
                await self._after_conflict(conflicts)
            except UnavailableError as error:
                group = _patient(group, error)
                await asyncio.sleep(RETRY_S)
            else:
                for pending in decided:
                    pending.finish()
                group = group[len(decided) :]

    async def _attempt(self, group: list[_Pending]) -> list[_Pending]:
        """Takes and writes as many decisions as fit one transaction; those that it took."""
        await self._store.catch_up()
        decided, changes = self._decide(group)
        if changes:
            await self._store.commit(changes)
        return decided

    def _decide(self, group: list[_Pending]) -> tuple[list[_Pending], dict[str, tuple[Document | None, int]]]:
        state = self._store.state
        decided: list[_Pending] = []
        with state.trial() as trial:
            for pending in group:
                pending.result = _taken(pending.decision, state)
                if isinstance(pending.result, Outcome):
                    if decided and len(trial.changes) + len(pending.result.changes) > BATCH_MAX:
                        break
                    trial.apply(pending.result.changes)
                decided.append(pending)
            wanted = dict(trial.changes)
        return decided, {key: (document, state.revision(key)) for key, document in wanted.items()}

    async def _after_conflict(self, conflicts: int) -> None:
        await asyncio.sleep(random.uniform(0, PAUSE_S * conflicts))
        if conflicts % DISTRUST == 0:
            try:
                await self._store.reload()
            except UnavailableError as error:
                log.warning("mirror not renewed", extra={"error": error})


def _taken(decision: Decision, state: State) -> Outcome | Exception:
    try:
        return decision(state)
    except Exception as error:  # a refusal, or a fault that must not stop the others
        return error


def _patient(group: list[_Pending], error: UnavailableError) -> list[_Pending]:
    """Those that can still wait; the others hear why they need not."""
    oldest = time.monotonic() - PATIENCE_S
    for pending in group:
        if pending.since <= oldest:
            pending.result = error
            pending.finish()
    return [pending for pending in group if pending.since > oldest]
