"""mDNS (RFC 6762) and DNS-SD (RFC 6763): what to say on the bridge, and when. No sockets and no clock.

Theory of operation
-------------------
*Owned* by the resolver's event loop. For each service that is known there is a *claim* on its name and on its DNS-SD
names: probed three times (section 8.1), announced twice (8.3), then held. Names of policies and instances are answered
while the claim on the service's own name is held.

Conflicts (section 9): who answers a probe, or wins a tie by its data (8.2), has the name. The cluster gave it to the
service, so it is not changed: the claim rests for `LOST_S` and is tried again; on DNS the name stays. A held name that
somebody else answers for is probed again.

Questions are answered by multicast, or by unicast where that was asked for or where the question did not come from
port 5353 (5.4, 6.7). What the asker knows already is left out (7.1), also if its list comes in several packets (7.2).
Records that others may have too are delayed by chance (6); none is multicast twice within `REPEAT_S`, but in defence.
A name of ours without a record of the type gets NSEC (6.1). A service that is gone, or changes, says goodbye (10.1).

Bounded: `DUE_MAX` claims a tick, packets of `PACKET_MAX` bytes, `SOURCES_MAX` askers whose list is awaited.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Final, NamedTuple

import dns.exception
import dns.name
import dns.rdata
import dns.wire
from dns.rdataclass import IN, RdataClass
from dns.rdatatype import AAAA, ANY, NSEC, PTR, SRV, TXT, A, RdataType, to_text

from appliance.naming import names
from appliance.naming.names import Labels
from appliance.naming.service import Service
from appliance.naming.zone import Found, Unknown, Zone

LOCAL: Final = (b"local",)
PORT: Final = 5353
TTL: Final = 120
"""RFC 6762 section 10, for records with a host's name; used for all, as a goodbye may get lost."""
LEGACY_TTL: Final = 10
PROBES: Final = 3
PROBE_S: Final = 0.25
ANNOUNCEMENTS: Final = 2
ANNOUNCE_S: Final = 1.0
LOST_S: Final = 60.0
TIE_S: Final = 1.0
REPEAT_S: Final = 1.0
DELAY_S: Final = (0.02, 0.12)
MORE_S: Final = (0.4, 0.5)
DUE_MAX: Final = 256
SOURCES_MAX: Final = 256
SENT_MAX: Final = 65_536
PACKET_MAX: Final = 1400
FLUSH: Final = 0x8000
"""Cache-flush in a record's class, unicast wanted in a question's."""
_ALL_KINDS: Final = (A, AAAA, SRV, TXT)
_RESPONSE, _TC = 0x8400, 0x0200
_HEADER = struct.Struct("!6H")

Address = tuple[object, ...]


class Send(NamedTuple):
    """A packet, to one address or (None) to the group."""

    data: bytes
    to: Address | None = None


class Rr(NamedTuple):
    """A record; ``unique`` if nobody else has one of this name and type."""

    owner: Labels
    kind: int
    rdata: bytes
    unique: bool = True


class Asked(NamedTuple):
    """A question."""

    labels: Labels
    kind: int
    unicast: bool


class Heard(NamedTuple):
    """A packet, read. ``known`` are its answers with their TTLs, ``proposed`` its authority section."""

    identity: int
    flags: int
    questions: list[Asked]
    known: list[tuple[Rr, int]]
    proposed: list[Rr]


@dataclass(slots=True)
class Claim:
    """How far a service's names are ours."""

    records: tuple[Rr, ...]
    probes: int = 0
    announcements: int = 0
    lost: bool = False

    @property
    def held(self) -> bool:
        """Whether questions are answered."""
        return self.probes >= PROBES and not self.lost


@dataclass(slots=True)
class _Later:
    """Questions whose answer waits: for chance, or for the rest of what the asker knows."""

    at: float
    source: Address
    heard: Heard
    known: set[Rr] = field(default_factory=set)


class Multicast:
    """See the module. ``wanted`` is called with what only the cluster knows."""

    def __init__(self, zone: Zone, wanted: Callable[[str], None], random: Random) -> None:
        self.zone = zone
        self.counters: Counter[str] = Counter()
        self.claims: dict[str, Claim] = {}
        self._wanted = wanted
        self._random = random
        self._due: dict[str, float] = {}
        self._later: dict[Address, _Later] = {}
        self._sent: dict[Rr, float] = {}

    # --- services ---------------------------------------------------------------------------------------------------

    def update(self, changed: Iterable[str], now: float) -> list[Send]:
        """Services are new, different or gone: says goodbye to what is no more, and claims what is new."""
        gone: list[Rr] = []
        for job in changed:
            old = self.claims.pop(job, None)
            self._due.pop(job, None)
            service = self.zone.services.get(job)
            new = tuple(self._records(service)) if service is not None and self._has_name(service) else ()
            if old is not None and old.held:
                gone += [it for it in old.records if it not in new]
            if new:
                known = old is not None and old.held and {it.owner for it in new} <= {it.owner for it in old.records}
                self.claims[job] = Claim(new, PROBES if known else 0)
                self._due[job] = now + (0 if known else self._random.uniform(0, PROBE_S))
        return [Send(it) for it in _responses(gone, 0)]

    def goodbye(self) -> list[Send]:
        """All names are given up."""
        records = [it for claim in self.claims.values() if claim.held for it in claim.records]
        self.claims.clear()
        self._due.clear()
        return [Send(it) for it in _responses(records, 0)]

    def _has_name(self, service: Service) -> bool:
        """Of two jobs that differ in case only, one has the name."""
        return self.zone.service(names.of_job(service.job)) is service

    def _records(self, service: Service) -> Iterator[Rr]:
        host = (*names.of_job(service.job), *LOCAL)
        yield from self._all_of(host, (A, AAAA))
        for kind, label in self.zone.discoverable(service):
            instance = (label, *kind, *LOCAL)
            yield Rr((*kind, *LOCAL), PTR, names.wire(instance), False)
            yield from self._all_of(instance, (SRV, TXT))

    def _all_of(self, owner: Labels, kinds: Iterable[int]) -> Iterator[Rr]:
        found = self.zone.find(owner)
        if isinstance(found, Found):
            yield from (Rr(owner, int(kind), rdata) for kind in kinds for rdata in found.records.get(kind, ()))

    # --- time -------------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When ``tick`` has something to say."""
        return min((*self._due.values(), *(it.at for it in self._later.values())), default=None)

    def tick(self, now: float) -> list[Send]:
        """Probes, announcements and answers that are due."""
        probes: list[Claim] = []
        announced: list[Rr] = []
        for job in [job for job, at in self._due.items() if at <= now][:DUE_MAX]:
            claim = self.claims[job]
            if claim.lost:
                self.claims[job] = claim = Claim(claim.records)
            if claim.probes < PROBES:
                probes.append(claim)
                claim.probes += 1
                self._due[job] = now + PROBE_S
            else:
                announced += claim.records
                claim.announcements += 1
                self._due[job] = now + ANNOUNCE_S
                if claim.announcements >= ANNOUNCEMENTS:
                    del self._due[job]
        for it in announced:
            self._sent[it] = now
        sends = [Send(it) for it in (*_probes(probes), *_responses(announced, TTL))]
        for source in [source for source, it in self._later.items() if it.at <= now]:
            later = self._later.pop(source)
            sends += self._answer(later.heard, later.source, later.known, now)
        return sends

    # --- packets ----------------------------------------------------------------------------------------------------

    def received(self, data: bytes, source: Address, now: float) -> list[Send]:
        """What a packet gets at once."""
        try:
            heard = read(data)
        except (dns.exception.DNSException, ValueError, struct.error):
            self.counters["malformed"] += 1
            return []
        if heard.flags & 0x7800:
            return []
        if heard.flags & 0x8000:
            if source[1] == PORT:
                self._conflicts(heard, now)
            return []
        self.counters["queries"] += 1
        self._ties(heard, now)
        return self._query(heard, source, now)

    def _query(self, heard: Heard, source: Address, now: float) -> list[Send]:
        known = {record for record, ttl in heard.known if ttl * 2 >= TTL}
        waiting = self._later.get(source)
        if waiting is not None and not heard.questions:
            waiting.known |= known
            return []
        more = bool(heard.flags & _TC)
        shared = source[1] == PORT and any(self._is_shared(it) for it in heard.questions)
        if not (more or shared) or waiting is not None or len(self._later) >= SOURCES_MAX:
            return self._answer(heard, source, known, now)
        self._later[source] = _Later(now + self._random.uniform(*(MORE_S if more else DELAY_S)), source, heard, known)
        return []

    def _is_shared(self, asked: Asked) -> bool:
        found = self._find(asked.labels)
        return found is not None and found.shared

    def _find(self, labels: Labels) -> Found | None:
        """A name that may be answered for now."""
        if labels[-1:] != LOCAL and labels[-1:] != (b"arpa",):
            return None
        found = self.zone.find(labels)
        if isinstance(found, Unknown):
            self._wanted(found.key)
        if not isinstance(found, Found) or not found.records:
            return None
        claim = None if found.job is None else self.claims.get(found.job)
        return found if found.job is None or (claim is not None and claim.held) else None

    def _answer(self, heard: Heard, source: Address, known: set[Rr], now: float) -> list[Send]:
        legacy = source[1] != PORT
        probing = {it.owner for it in heard.proposed}
        to_all: dict[Rr, None] = {}
        to_one: dict[Rr, None] = {}
        extra: dict[Rr, None] = {}
        for asked in heard.questions:
            for record in self._records_for(asked, extra):
                if record in known or record._replace(unique=True) in known:
                    self.counters["known-answers"] += 1
                elif legacy or asked.unicast:
                    to_one[record] = None
                elif now - self._sent.get(record, -REPEAT_S) >= REPEAT_S or record.owner in probing:
                    to_all[record] = None
        return self._packets(heard, source, list(to_one), list(to_all), list(extra), now)

    def _packets(
        self, heard: Heard, source: Address, to_one: list[Rr], to_all: list[Rr], extra: list[Rr], now: float
    ) -> list[Send]:
        sends = []
        if source[1] != PORT and to_one:
            sends.append(Send(_legacy(heard, to_one), source))
        elif to_one:
            sends += [Send(it, source) for it in _responses(to_one, TTL, extra)]
        if to_all:
            if len(self._sent) > SENT_MAX:
                self._sent.clear()
            self._sent.update(dict.fromkeys(to_all, now))
            sends += [Send(it) for it in _responses(to_all, TTL, extra)]
        self.counters["answers"] += len(sends)
        return sends

    def _records_for(self, asked: Asked, extra: dict[Rr, None]) -> Iterator[Rr]:
        found = self._find(asked.labels)
        if found is None:
            return
        kinds = list(found.records) if asked.kind == ANY else [asked.kind] if asked.kind in found.records else []
        for kind in kinds:
            yield from (Rr(asked.labels, kind, rdata, not found.shared) for rdata in found.records[kind])
        if PTR in kinds:
            for pointer in found.records[PTR]:
                self._add_extra(pointer, extra)
        extra.update({Rr(owner, kind, rdata): None for owner, kind, rdata in found.extra})
        if not kinds and not found.shared:
            yield Rr(asked.labels, NSEC, _nsec(asked.labels, found.records))

    def _add_extra(self, pointer: bytes, extra: dict[Rr, None]) -> None:
        """What who browses will ask for next (RFC 6763 section 12.1)."""
        owner = names.of(dns.name.from_wire(pointer, 0)[0])
        found = self._find(owner)
        if found is None or SRV not in found.records:
            return
        for kind in (SRV, TXT):
            extra.update({Rr(owner, int(kind), rdata): None for rdata in found.records.get(kind, ())})
        extra.update({Rr(name, kind, rdata): None for name, kind, rdata in found.extra})

    # --- conflicts --------------------------------------------------------------------------------------------------

    def _claim_of(self, owner: Labels) -> tuple[str, Claim] | None:
        found = self.zone.find(owner) if owner[-1:] == LOCAL else None
        job = found.job if isinstance(found, Found) else None
        claim = self.claims.get(job) if job is not None else None
        return None if job is None or claim is None else (job, claim)

    def _conflicts(self, heard: Heard, now: float) -> None:
        """Somebody else has records of a name of ours."""
        for record, ttl in heard.known:
            ours = self._claim_of(record.owner) if record.kind in _ALL_KINDS and ttl else None
            if ours is None or record.owner not in {it.owner for it in ours[1].records}:
                continue
            job, claim = ours
            if claim.lost or record.rdata in {it.rdata for it in claim.records if it[:2] == record[:2]}:
                continue
            self.counters["conflicts"] += 1
            if claim.held:
                self.claims[job] = Claim(claim.records)
                self._due[job] = now
            else:
                claim.lost = True
                self._due[job] = now + LOST_S

    def _ties(self, heard: Heard, now: float) -> None:
        """Somebody else probes for what we are probing for: the later data wins (section 8.2)."""
        for owner in {it.owner for it in heard.proposed}:
            ours = self._claim_of(owner)
            if ours is None or ours[1].held or ours[1].lost:
                continue
            mine = sorted((it.kind, it.rdata) for it in ours[1].records if it.owner == owner)
            theirs = sorted((it.kind, it.rdata) for it in heard.proposed if it.owner == owner)
            if mine and mine < theirs:
                self.counters["ties-lost"] += 1
                ours[1].probes = 0
                self._due[ours[0]] = now + TIE_S


# --- Packets in bytes -------------------------------------------------------------------------------------------------


def read(data: bytes) -> Heard:
    """A packet. Raises DNSException, ValueError or struct.error if it is none."""
    parser = dns.wire.Parser(data)
    identity, flags, *counts = parser.get_struct("!6H")
    questions = []
    for _ in range(counts[0]):
        name = parser.get_name()
        kind, klass = parser.get_struct("!HH")
        questions.append(Asked(names.of(name), kind, bool(klass & FLUSH)))
    known = [_read_record(parser) for _ in range(counts[1])]
    proposed = [_read_record(parser)[0] for _ in range(counts[2])]
    return Heard(identity, flags, questions, known, proposed)


def _read_record(parser: dns.wire.Parser) -> tuple[Rr, int]:
    name = parser.get_name()
    kind, klass, ttl, size = parser.get_struct("!HHIH")
    with parser.restrict_to(size):
        rdata = dns.rdata.from_wire_parser(RdataClass(klass & ~FLUSH), RdataType(kind), parser)
    canonical = bytes(rdata.to_wire() or b"")
    if kind == PTR:
        canonical = names.wire(names.of(dns.name.from_wire(canonical, 0)[0]))
    return Rr(names.of(name), kind, canonical), ttl


def _responses(records: list[Rr], ttl: int, extra: Iterable[Rr] = ()) -> Iterator[bytes]:
    """Responses with these records, in as few packets as they fit; extra records where there is room."""
    encoded = [_record(it, ttl, FLUSH if it.unique else 0) for it in records]
    additional = [_record(it, ttl, FLUSH) for it in extra if it not in set(records)]
    while encoded:
        taken = _fitting(encoded, PACKET_MAX)
        body, encoded = encoded[:taken], encoded[taken:]
        room = PACKET_MAX - sum(map(len, body))
        more = [] if encoded else additional[: _fitting(additional, room, least=0)]
        yield _HEADER.pack(0, _RESPONSE, 0, len(body), 0, len(more)) + b"".join(body) + b"".join(more)


def _fitting(parts: list[bytes], room: int, least: int = 1) -> int:
    """How many of the first parts fit; at least one, as a packet may be longer than that."""
    count = 0
    for part in parts:
        room -= len(part)
        if room < 0:
            break
        count += 1
    return max(count, min(least, len(parts)))


def _record(record: Rr, ttl: int, flush: int) -> bytes:
    head = struct.pack("!HHIH", record.kind, IN | flush, ttl, len(record.rdata))
    return names.wire(record.owner) + head + record.rdata


def _probes(claims: list[Claim]) -> Iterator[bytes]:
    """Probes: a question for every type of each name, and the records that we want to have (section 8.1)."""
    for claim in claims:
        unique = [it for it in claim.records if it.unique]
        owners = dict.fromkeys(it.owner for it in unique)
        questions = b"".join(names.wire(owner) + struct.pack("!HH", ANY, IN | FLUSH) for owner in owners)
        proposed = b"".join(_record(it, TTL, 0) for it in unique)
        yield _HEADER.pack(0, 0, len(owners), 0, len(unique), 0) + questions + proposed


def _legacy(heard: Heard, records: list[Rr]) -> bytes:
    """The answer to an ordinary resolver: its identity and questions, no flush, a short life (section 6.7)."""
    questions = b"".join(names.wire(it.labels) + struct.pack("!HH", it.kind, IN) for it in heard.questions)
    encoded = [_record(it, LEGACY_TTL, 0) for it in records]
    body = encoded[: _fitting(encoded, PACKET_MAX)]
    return _HEADER.pack(heard.identity, _RESPONSE, len(heard.questions), len(body), 0, 0) + questions + b"".join(body)


def _nsec(owner: Labels, kinds: Iterable[int]) -> bytes:
    """That a name has these types and no other."""
    listed = " ".join(to_text(RdataType(kind)) for kind in sorted(kinds))
    return dns.rdata.from_text(IN, NSEC, f"{names.text(owner)} {listed}").to_wire() or b""
