"""The wire format of answers (RFC 1035 section 4, EDNS0: RFC 6891).

An answer is kept as its *tail*: all that follows the question. The question comes from whoever asks, in their spelling
(0x20), and owner names point at it, so one tail answers every spelling. What is not hot is read and written by
dnspython; a test holds that it reads what is written here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Final

import dns.message
import dns.opcode
from dns.exception import DNSException
from dns.rcode import BADVERS, FORMERR, NOERROR, NOTIMP, NXDOMAIN, REFUSED, SERVFAIL, Rcode
from dns.rdatatype import ANY, HINFO, SOA

from appliance.naming import names
from appliance.naming.names import Labels
from appliance.naming.zone import ANY_ANSWER, Found

__all__ = ["BADVERS", "FORMERR", "NOERROR", "NOTIMP", "NXDOMAIN", "REFUSED", "SERVFAIL"]

HEADER: Final = 12
PLAIN_MAX: Final = 512
"""Bytes of a datagram to who does not speak EDNS (RFC 1035 section 2.3.4)."""
EDNS_MAX: Final = 1232
"""Bytes of a datagram that no path cuts (DNS flag day 2020); what the resolver offers and what it uses."""
TCP_MAX: Final = 65_535
TTL_OFFSET: Final = 4
"""Of a record's TTL, from the end of its owner's name."""
TO_QUESTION: Final = b"\xc0\x0c"
"""A pointer to the question's name, which always follows the header."""
CLASS_IN: Final = b"\x00\x01"
OPT: Final = b"\0" + bytes((0, 41)) + EDNS_MAX.to_bytes(2, "big") + bytes(6)
OPT_DO: Final = OPT[:7] + b"\x80" + OPT[8:]
"""The same with DO, which is copied from the question (RFC 3225 section 3)."""
_RECORD = Struct("!HHIH")
_COUNTS = Struct("!HHHH")
_QR, _AA, _TC, _RD, _RA, _AD, _CD = 0x80, 0x04, 0x02, 0x01, 0x80, 0x20, 0x10


@dataclass(frozen=True, slots=True)
class Tail:
    """An answer without header, question and OPT. ``counts`` are of its three sections."""

    rcode: int
    authoritative: bool
    counts: tuple[int, int, int]
    data: bytes
    ttls: tuple[int, ...] = ()
    """Where in ``data`` each TTL is."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record; without an owner it is the question's name that has it."""

    owner: Labels | None
    kind: int
    ttl: int
    rdata: bytes


@dataclass(frozen=True, slots=True)
class Question:
    """A well-formed query. ``limit`` is what fits into the answer's datagram."""

    head: bytes
    """Identity and flags."""
    asked: bytes
    """The question section, as it was spelled."""
    labels: Labels
    kind: int
    klass: int
    edns: bool
    do: bool
    limit: int


class QueryError(ValueError):
    """A query that gets an error. ``reply`` is that answer, empty if it deserves none."""

    def __init__(self, reason: str, reply: bytes = b"") -> None:
        super().__init__(reason)
        self.reason = reason
        self.reply = reply


def tail(rcode: int, answers: Iterable[Record], authority: Iterable[Record] = (), extra: Iterable[Record] = (), *,
         authoritative: bool = True) -> Tail:  # fmt: skip
    """An answer of these records."""
    data, ttls, counts = bytearray(), [], []
    for section in (answers, authority, extra):
        count = 0
        for record in section:
            data += TO_QUESTION if record.owner is None else names.wire(record.owner)
            ttls.append(len(data) + TTL_OFFSET)
            data += _RECORD.pack(record.kind, 1, record.ttl, len(record.rdata)) + record.rdata
            count += 1
        counts.append(count)
    return Tail(rcode, authoritative, (counts[0], counts[1], counts[2]), bytes(data), tuple(ttls))


def of_found(found: Found, kind: int, soa: bytes, ttl_negative: int) -> Tail:
    """The answer that something found is to a question for a type."""
    if kind == ANY and found.records:
        return tail(NOERROR, [Record(None, HINFO, found.ttl, ANY_ANSWER)])
    rdata = found.records.get(kind, ())
    if not rdata:
        return negative(NOERROR if found.exists else NXDOMAIN, found.zone, soa, ttl_negative)
    answers = [Record(None, kind, found.ttl, it) for it in rdata]
    extra = [Record(owner, type_, found.ttl, it) for owner, type_, it in found.extra] if _wants_extra(kind) else []
    return tail(NOERROR, answers, (), extra)


def negative(rcode: int, zone: Labels, soa: bytes, ttl: int) -> Tail:
    """NXDOMAIN or NODATA, with the SOA that says how long it counts (RFC 2308 section 5)."""
    return tail(rcode, (), [Record(zone, SOA, ttl, soa)])


def _wants_extra(kind: int) -> bool:
    return kind not in (1, 28)


def assemble(question: Question, answer: Tail, ttl_spent: int = 0) -> bytes:
    """The answer's datagram or TCP message. What is too long for it is cut off as a whole, and TC says so."""
    opt = b"" if not question.edns else OPT_DO if question.do else OPT
    data, counts = answer.data, answer.counts
    if HEADER + len(question.asked) + len(data) + len(opt) > question.limit:
        return _header(question, answer, truncated=True) + question.asked + opt
    if ttl_spent:
        data = _aged(answer, ttl_spent)
    return _header(question, answer, counts=counts) + question.asked + data + opt


def _aged(answer: Tail, spent: int) -> bytes:
    data = bytearray(answer.data)
    for at in answer.ttls:
        left = max(0, int.from_bytes(data[at : at + 4], "big") - spent)
        data[at : at + 4] = left.to_bytes(4, "big")
    return bytes(data)


def _header(
    question: Question, answer: Tail, counts: tuple[int, int, int] = (0, 0, 0), *, truncated: bool = False
) -> bytes:
    first = _QR | (_AA if answer.authoritative else 0) | (_TC if truncated else 0) | question.head[2] & _RD
    second = _RA | question.head[3] & _CD | answer.rcode
    extra = counts[2] + question.edns
    return question.head[:2] + bytes((first, second)) + _COUNTS.pack(1, counts[0], counts[1], extra)


def answer_flags(rcode: int) -> dict[bytes, bytes]:
    """The flags of an authoritative answer by those of a query; others than these are read with more care."""
    return {
        bytes((recursion, authentic | checking)): bytes((_QR | _AA | recursion, _RA | checking | rcode))
        for recursion in (0, _RD)
        for authentic in (0, _AD)
        for checking in (0, _CD)
    }


def counts(answers: int, authority: int, extra: int) -> bytes:
    """The counts of an answer with one question."""
    return _COUNTS.pack(1, answers, authority, extra)


def read(data: bytes, *, datagram: bool) -> Question:
    """The question of a query. Raises QueryError."""
    if len(data) < HEADER or data[2] & _QR:
        raise QueryError("malformed" if len(data) < HEADER else "response")
    if data[2] >> 3 & 0xF != dns.opcode.QUERY:
        raise QueryError("opcode", failure(data, NOTIMP))
    try:
        message = dns.message.from_wire(data, ignore_trailing=False)
    except (DNSException, ValueError, IndexError, KeyError, NotImplementedError):
        raise QueryError("malformed", failure(data, FORMERR)) from None
    if len(message.question) != 1 or message.answer or message.authority:
        raise QueryError("malformed", failure(data, FORMERR))
    if message.edns > 0:
        raise QueryError("edns-version", _bad_version(data, message))
    return _question(data, message, datagram=datagram)


def _question(data: bytes, message: dns.message.Message, *, datagram: bool) -> Question:
    asked = message.question[0]
    edns = message.edns >= 0
    limit = min(max(message.payload, PLAIN_MAX), EDNS_MAX) if edns else PLAIN_MAX
    spelled = bytes(asked.name.to_wire() or b"") + asked.rdtype.to_bytes(2, "big") + asked.rdclass.to_bytes(2, "big")
    do = bool(message.ednsflags & 0x8000)
    labels = names.of(asked.name)
    return Question(
        data[:4], spelled, labels, int(asked.rdtype), int(asked.rdclass), edns, do, limit if datagram else TCP_MAX
    )


def failure(data: bytes, rcode: int) -> bytes:
    """A header that says what is wrong with a message that has one, and nothing else."""
    first = _QR | data[2] & 0x78 | data[2] & _RD
    return data[:2] + bytes((first, _RA | rcode)) + bytes(8)


def _bad_version(data: bytes, message: dns.message.Message) -> bytes:
    """BADVERS is in the OPT record's part of the code (RFC 6891 section 6.1.3)."""
    end = HEADER + len(message.question[0].name.to_wire() or b"") + 4
    opt = OPT[:5] + bytes((BADVERS >> 4,)) + OPT[6:]
    flags = bytes((_QR | data[2] & _RD, _RA))
    return data[:2] + flags + _COUNTS.pack(1, 0, 0, 1) + data[HEADER:end] + opt


def plain(rcode: Rcode, *, authoritative: bool = False) -> Tail:
    """An answer that is only a code."""
    return Tail(int(rcode), authoritative, (0, 0, 0), b"")
