"""Changes on their way to the tables: together when they come fast, and before anybody is told that they are there.

*Owned* by the member, in its event loop. ``publish`` may take long on large tables, and nothing else runs meanwhile: so
the next call waits as long as the last one took, and the changes in between become one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from appliance.cluster.messages import ClusterNode, TableQueryResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tables(Iterable[TableQueryResult]):
    """All that is known, by job, and the jobs that are different from last time, or gone; the same of nodes, by id."""

    jobs: Mapping[str, TableQueryResult]
    changed: frozenset[str]
    nodes: Mapping[str, ClusterNode] = field(default_factory=dict)
    changed_nodes: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[TableQueryResult]:
        return iter(self.jobs.values())


class Feed:
    """See the module. ``jobs`` and ``nodes`` are looked at anew for each call of ``publish``."""

    def __init__(
        self,
        jobs: Mapping[str, TableQueryResult],
        publish: Callable[[Tables], None],
        nodes: Mapping[str, ClusterNode] | None = None,
    ) -> None:
        self.failures = 0
        self._jobs = jobs
        self._publish = publish
        self._changed: set[str] = set()
        self._nodes = {} if nodes is None else nodes
        self._changed_nodes: set[str] = set()
        self._then: list[Callable[[], None]] = []
        self._not_before = float("-inf")
        self._handle: asyncio.TimerHandle | None = None

    def change(self, jobs: Iterable[str]) -> None:
        """These jobs look different now."""
        self._changed.update(jobs)
        self._soon()

    def change_nodes(self, nodes: Iterable[str]) -> None:
        """These nodes are other ones now."""
        self._changed_nodes.update(nodes)
        self._soon()

    def _soon(self) -> None:
        if self._handle is None:
            loop = asyncio.get_running_loop()
            self._handle = loop.call_at(max(loop.time(), self._not_before), self.flush)

    def then(self, callback: Callable[[], None]) -> None:
        """Calls back once the changes until now are published."""
        if self._changed:
            self._then.append(callback)
        else:
            callback()

    def flush(self) -> None:
        """Publishes what has changed. If that fails, it is part of the next attempt."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._changed or self._changed_nodes:
            self._attempt()
        callbacks, self._then = self._then, []
        for callback in callbacks:
            callback()

    def _attempt(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            nodes = frozenset(self._changed_nodes)
            self._publish(Tables(self._jobs, frozenset(self._changed), self._nodes, nodes))
            self._changed.clear()
            self._changed_nodes.clear()
        except Exception as error:
            self.failures += 1
            log.exception("tables refused, the old ones stay in force", extra={"error": str(error)})
        self._not_before = 2 * loop.time() - began
