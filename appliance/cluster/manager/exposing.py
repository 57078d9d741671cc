"""Which nodes have ports for which jobs: a retained message a job, which every node reads (``cluster/exposed/<job>``).

*Owns* the jobs whose message is to be compared with the state. What a message says follows from the job's document, so
several managers say the same. It is said when a job's exposed ports change, and, as a manager cannot know what was
missed, of all that have some when the state was read anew. Sending that fails is repeated.

A node that hears of a job of which it has ports follows that job, and finds all else in the job's own answer: so a
message that is outdated for a moment costs a question and opens no port.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import NoReturn

import orjson

from appliance.cluster.manager import topics
from appliance.cluster.manager.decide import Message
from appliance.cluster.manager.documents import Document, Job
from appliance.cluster.manager.outbox import Outbox
from appliance.cluster.manager.state import State
from appliance.cluster.manager.store import Store, UnavailableError

log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""Pause before what could not be sent is sent again."""


def entry(state: State, job: str) -> bytes:
    """What is said of a job; nothing if no node has ports for it."""
    document = state.job(job) or Job()
    wanted = [it.nodes for it in document.names.exposed]
    if not wanted:
        return b""
    if "all" in wanted:
        return orjson.dumps({"nodes": "all"})
    listed = sorted({name for it in wanted if isinstance(it, tuple) for name in it})
    return orjson.dumps({"nodes": listed or "hosting"})


class Exposing:
    """See the module."""

    def __init__(self, store: Store, outbox: Outbox) -> None:
        self._store = store
        self._outbox = outbox
        self._dirty: set[str] = set()
        self._some = asyncio.Event()

    async def run(self) -> NoReturn:
        """Says what is to be said, for ever."""
        while True:
            await self._some.wait()
            self._some.clear()
            dirty, self._dirty = self._dirty, set()
            said = [Message(topics.exposed(job), entry(self._store.state, job), retain=True) for job in sorted(dirty)]
            try:
                await self._outbox.send(said)
            except UnavailableError as error:
                log.warning("exposed ports not published", extra={"error": error})
                await asyncio.sleep(AGAIN_S)
                self._mark(dirty)

    def changed(self, key: str, before: Document | None, after: Document | None) -> None:
        """A document has changed."""
        kind, _, job = key.partition(".")
        ports = [it.names.exposed if isinstance(it, Job) else () for it in (before, after)]
        if kind == "job" and ports[0] != ports[1]:
            self._mark((job,))

    def reloaded(self) -> None:
        """All documents were read anew."""
        state = self._store.state
        self._mark(job for job in state.jobs() if entry(state, job))

    def _mark(self, jobs: Iterable[str]) -> None:
        self._dirty.update(jobs)
        if self._dirty:
            self._some.set()
