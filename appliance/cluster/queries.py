"""Questions to the cluster that are not answered yet. No input or output.

*Owned* by the session. At most one question a key, a job's name or an address, is open: whoever asks for the same
joins it. At most ``OPEN_MAX`` are sent and unanswered, so that a node that comes back with thousands of services
does not flood its manager; the others wait, and a question that somebody waits for goes before those that nobody
does. At most ``WAITED_MAX`` of the former are kept: containers choose the addresses that are asked for.

An address that nobody has is remembered for ``UNKNOWN_FOR`` seconds, so that packets to it cost one question in
that time; at most ``UNKNOWN_MAX`` of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

OPEN_MAX: Final = 128
"""A manager that needs 1 ms for an answer has this many within a small part of the time that is waited for them."""
WAITED_MAX: Final = 1024
"""Each may hold packets in a worker; more are refused at once."""
UNKNOWN_FOR: Final = 2.0
"""Seconds. A service that is deployed just now is asked for again before its clients give up."""
UNKNOWN_MAX: Final = 4096
"""The oldest make room: to forget one costs a question."""


@dataclass
class Query:
    """One question. ``deadline`` is None as long as it is unsent and nobody waits."""

    key: str
    deadline: float | None = None
    waited: bool = False
    sent: bool = False


class Queries:
    """See the module. ``timeout`` in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._queries: dict[str, Query] = {}
        self._waited: deque[str] = deque()  # keys to send, those that somebody waits for, and the rest; a key
        self._rest: deque[str] = deque()  # whose question is gone, or was sent from the other one, is passed over
        self._open = 0
        self._awaited = 0
        self._unknown: dict[str, float] = {}

    def __len__(self) -> int:
        """Questions without an answer, sent or not."""
        return len(self._queries)

    def get(self, key: str) -> Query | None:
        """The question about a key."""
        return self._queries.get(key)

    def ask(self, key: str) -> Query:
        """The question about a key that nobody waits for: a new one, or the one that is there."""
        query = self._queries.get(key)
        if query is None:
            query = self._queries[key] = Query(key)
            self._rest.append(key)
        return query

    def wait(self, key: str, now: float) -> Query | None:
        """The question about a key that somebody waits for, at most until its deadline; None if there are too many."""
        query = self._queries.get(key)
        if query is not None and query.waited:
            return query
        if self._awaited >= WAITED_MAX:
            return None
        query = self.ask(key)
        query.waited = True
        self._awaited += 1
        query.deadline = query.deadline or now + self._timeout
        self._waited.append(key)
        return query

    def to_send(self, now: float) -> Iterator[Query]:
        """The questions to send now; they count as sent."""
        for queue in (self._waited, self._rest):
            while queue and self._open < OPEN_MAX:
                query = self._queries.get(queue.popleft())
                if query is not None and not query.sent:
                    query.sent = True
                    self._open += 1
                    query.deadline = query.deadline or now + self._timeout
                    yield query

    def close(self, key: str) -> Query | None:
        """Takes a question away, as it was answered or its deadline passed; None if there was none."""
        query = self._queries.pop(key, None)
        if query is not None:
            self._open -= query.sent
            self._awaited -= query.waited
        return query

    def interrupt(self) -> None:
        """The connection is lost: what somebody waits for is to be sent again, the rest is not needed."""
        self._queries = {key: query for key, query in self._queries.items() if query.waited}
        self._rest.clear()
        self._waited = deque(self._queries)
        self._open = 0
        for query in self._queries.values():
            query.sent = False

    def nobody_has(self, key: str, now: float) -> None:
        """Remembers for a while that an address is unknown."""
        self._unknown.pop(key, None)
        if len(self._unknown) >= UNKNOWN_MAX:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[key] = now + UNKNOWN_FOR

    def is_unknown(self, key: str, now: float) -> bool:
        """Whether nobody had an address a moment ago."""
        return now < self._unknown.get(key, now)
