"""Answers by the bytes that they came in: one that says what it said last time is not parsed and checked again.

*Owned* by the session. When a connection returns, and every ``refresh`` seconds, every job is asked for again, and most
answers are what they were. One a job is remembered, by a digest: a collision is as likely as two equal random numbers
of 128 bits.
"""

from __future__ import annotations

from hashlib import blake2b

from appliance.cluster.messages import TableQueryResult


class Memo:
    """The last answer about each job that is followed."""

    def __init__(self) -> None:
        self._results: dict[bytes, TableQueryResult] = {}
        self._digests: dict[str, bytes] = {}

    def get(self, payload: bytes) -> TableQueryResult | None:
        """What was made of the same bytes, if that was the last answer about its job."""
        return self._results.get(_digest(payload))

    def put(self, payload: bytes, result: TableQueryResult) -> None:
        """Remembers the last answer about its job."""
        self.forget(result.job)
        digest = self._digests[result.job] = _digest(payload)
        self._results[digest] = result

    def forget(self, job: str) -> None:
        """The job is not followed any more."""
        digest = self._digests.pop(job, None)
        if digest is not None:
            del self._results[digest]


def _digest(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=16).digest()
