"""Hot answers: the bytes of an answer, found by the bytes of its question.

*Owned* by the responder. A question that was answered once from the zone is answered again by one look-up and a few
slices, about 2 µs: its name is found by the first zero byte, as a name that is in here has none before its end. Only
questions of the usual form come this far: one question, the usual flags, no record but OPT. All others, and all
that are not in here, take the way through `packet.read`.

Answers are kept by the job that they depend on, so that a change forgets them at once; what depends on several jobs
is kept under no job, and forgotten at every change. `HOT_MAX` answers; the oldest makes room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from appliance.naming import packet
from appliance.naming.packet import EDNS_MAX, HEADER, OPT, OPT_DO, PLAIN_MAX, TCP_MAX, Question, Tail

HOT_MAX: Final = 131_072
"""Of about 500 bytes each: 64 MiB at the most, names of a large cluster in both families."""
_PLAIN: Final = b"\0\1\0\0\0\0\0\0"
_WITH_OPT: Final = b"\0\1\0\0\0\0\0\1"
_OPT_HEAD: Final = OPT[:3]
_OPT_SIZE: Final = len(OPT)
_FLAGS: Final = packet.answer_flags(packet.NOERROR)


@dataclass(slots=True)
class _Answer:
    plain: bytes
    """Counts, as for a question without EDNS."""
    edns: bytes
    data: bytes
    job: str


class Hot:
    """See the module."""

    def __init__(self, capacity: int = HOT_MAX) -> None:
        self._capacity = capacity
        self._answers: dict[bytes, _Answer] = {}
        self._keys: dict[str, set[bytes]] = {}
        self.used: set[str] = set()
        """Jobs whose answers were given since somebody last looked; that one empties it."""

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, data: bytes, datagram: bool) -> bytes | None:
        """The answer to a query, None if it has to be found out."""
        end = data.find(0, HEADER) + 5
        found = self._answers.get(data[HEADER : end - 4].lower() + data[end - 4 : end])
        flags = _FLAGS.get(data[2:4])
        if found is None or flags is None:
            return None
        counts = data[4:HEADER]
        if counts == _PLAIN and len(data) == end:
            limit, opt, reply_counts = PLAIN_MAX, b"", found.plain
        elif counts == _WITH_OPT and _is_opt(data, end):
            limit = int.from_bytes(data[end + 3 : end + 5], "big")
            limit = PLAIN_MAX if limit < PLAIN_MAX else EDNS_MAX if limit > EDNS_MAX else limit
            opt, reply_counts = OPT_DO if data[end + 7] & 0x80 else OPT, found.edns
        else:
            return None
        reply = b"".join((data[:2], flags, reply_counts, data[HEADER:end], found.data, opt))
        if len(reply) > (limit if datagram else TCP_MAX):
            return None
        self.used.add(found.job)
        return reply

    def keep(self, question: Question, tail: Tail, job: str | None) -> None:
        """Remembers an answer from the zone."""
        if tail.rcode != packet.NOERROR or not tail.authoritative:
            return
        if len(self._answers) >= self._capacity:
            self._drop(next(iter(self._answers)))
        key = question.asked[:-4].lower() + question.asked[-4:]
        answers, authority, extra = tail.counts
        plain, edns = (packet.counts(answers, authority, extra + opt) for opt in (0, 1))
        self._answers[key] = _Answer(plain, edns, tail.data, job or "")
        self._keys.setdefault(job or "", set()).add(key)

    def forget(self, jobs: Iterable[str]) -> None:
        """Drops all that depends on these jobs."""
        for job in ("", *jobs):
            for key in self._keys.pop(job, ()):
                self._answers.pop(key, None)

    def clear(self) -> None:
        """Drops everything."""
        self._answers.clear()
        self._keys.clear()

    def _drop(self, key: bytes) -> None:
        job = self._answers.pop(key).job
        keys = self._keys[job]
        keys.discard(key)
        if not keys:
            del self._keys[job]


def _is_opt(data: bytes, at: int) -> bool:
    """Whether what follows the question is one OPT record of version 0 and nothing else."""
    return (
        data[at : at + 3] == _OPT_HEAD
        and len(data) >= at + _OPT_SIZE
        and data[at + 6] == 0
        and len(data) == at + _OPT_SIZE + int.from_bytes(data[at + 9 : at + 11], "big")
    )
