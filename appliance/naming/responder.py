"""Bytes of a query in, bytes of its answer out, now or later. No sockets and no clock of its own.

*Owns* the zone, the hot answers and what waits for the cluster. A query is answered
1. from the hot answers (`hot`), else it is read, and then
2. from the zone, if it is ours;
3. after the cluster was asked, if it could be a service's name that is not known here (`waiting`);
4. by ``forward``, if it is not ours.

What is wrong gets the code that RFC 1035 has for it, or no answer if it was no query; each is a counter. Nothing that a
client sends raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import dns.rdata
from dns.rdataclass import IN
from dns.rdatatype import RdataType, to_text

from appliance.naming import names, packet
from appliance.naming.hot import Hot
from appliance.naming.names import Labels
from appliance.naming.packet import QueryError, Question, Tail
from appliance.naming.service import Service
from appliance.naming.waiting import Verdict, Waiting
from appliance.naming.zone import Found, Settings, Unknown, Zone

Reply = Callable[[bytes], None]
Forward = Callable[[Question, Callable[[Tail, int], None]], None]
"""Answers a question that is not ours: the tail, and the seconds that it has been kept."""
CLASS_IN = 1
TRANSFERS = frozenset({251, 252})
"""IXFR and AXFR: nobody copies this zone."""


class Responder:
    """See the module. ``ask`` puts a key to the cluster; ``clock`` gives monotonic seconds."""

    def __init__(
        self, settings: Settings, ask: Callable[[str], None], forward: Forward, clock: Callable[[], float], wait: float
    ) -> None:
        self.zone = Zone(settings)
        self.hot = Hot()
        self.waiting = Waiting(ask, wait, settings.ttl_negative)
        self.counters: Counter[str] = Counter()
        self._forward = forward
        self._clock = clock
        self._soa: dict[Labels, bytes] = {}

    def answer(self, data: bytes, reply: Reply, *, datagram: bool) -> bytes | None:
        """The answer. None: there will be none, or ``reply`` is called with it later."""
        hot = self.hot.answer(data, datagram)
        if hot is not None:
            self.counters["hot"] += 1
            return hot
        try:
            question = packet.read(data, datagram=datagram)
        except QueryError as error:
            self.counters[f"refused-{error.reason}"] += 1
            return error.reply or None
        return self._answer(question, reply)

    def _answer(self, question: Question, reply: Reply) -> bytes | None:
        if question.klass != CLASS_IN or question.kind in TRANSFERS:
            self.counters["refused-class-or-transfer"] += 1
            return packet.assemble(question, packet.plain(packet.REFUSED))
        found = self.zone.find(question.labels)
        match found:
            case Found():
                return self._from_zone(question, found)
            case Unknown():
                return self._from_cluster(question, found, reply)
        self.counters["forwarded"] += 1
        self._forward(question, lambda tail, spent: reply(packet.assemble(question, tail, spent)))
        return None

    def _from_zone(self, question: Question, found: Found) -> bytes:
        tail = packet.of_found(found, question.kind, self._soa_of(found.zone), self.zone.settings.ttl_negative)
        self.counters["zone"] += 1
        if tail.rcode == packet.NOERROR:
            self.hot.keep(question, tail, found.job)
        if found.job is not None:
            self.hot.used.add(found.job)
        return packet.assemble(question, tail)

    def _from_cluster(self, question: Question, unknown: Unknown, reply: Reply) -> bytes | None:
        verdict = self.waiting.join(
            unknown.key, lambda verdict: reply(self._after(question, unknown, verdict)), self._clock()
        )
        return None if verdict is None else self._after(question, unknown, verdict)

    def _after(self, question: Question, unknown: Unknown, verdict: Verdict) -> bytes:
        """The answer once the cluster has said, or not, what it knows."""
        found = self.zone.find(question.labels)
        if isinstance(found, Found):
            return self._from_zone(question, found)
        self.counters[f"cluster-{verdict.value.replace(' ', '-')}"] += 1
        if verdict is Verdict.NO_ANSWER:
            return packet.assemble(question, packet.plain(packet.SERVFAIL))
        soa = self._soa_of(unknown.zone)
        tail = packet.negative(packet.NXDOMAIN, unknown.zone, soa, self.zone.settings.ttl_negative)
        return packet.assemble(question, tail)

    def _soa_of(self, zone: Labels) -> bytes:
        if zone not in self._soa:
            self._soa[zone] = self.zone.soa(zone)
        return self._soa[zone]

    # --- what the supervisor says -----------------------------------------------------------------------------------

    def update(self, put: Iterable[Service], gone: Iterable[str]) -> set[str]:
        """Services changed, or are known no more. Gives the jobs whose names lead elsewhere now."""
        services = list(put)
        changed = self.zone.update(services, gone)
        self.hot.forget(changed if changed else ())
        now = self._clock()
        for service in services:
            self.waiting.learned(service.job.lower(), now)
        return changed

    def snapshot(self, services: Iterable[Service]) -> set[str]:
        """These are all services. Those that were known and are not among them are gone."""
        wanted = list(services)
        return self.update(wanted, self.zone.services.keys() - {it.job for it in wanted})

    def answered(self, key: str, verdict: Verdict) -> None:
        """The cluster said what it knows of a key."""
        self.waiting.end(key, verdict, self._clock())

    def configure(self, settings: Settings) -> None:
        """Answers otherwise from now on."""
        zone = Zone(settings)
        zone.update(self.zone.services.values(), ())
        self.zone = zone
        self.waiting.remember = settings.ttl_negative
        self._soa.clear()
        self.hot.clear()

    def explain(self, text: str) -> dict[str, Any]:
        """Why a name leads where it leads. Raises dns.exception.DNSException if it is no name."""
        labels = names.parse(text)
        found = self.zone.find(labels)
        match found:
            case None:
                return {"name": names.text(labels), "from": "upstream", "why": "the name is in no zone of ours"}
            case Unknown(key):
                return {"name": names.text(labels), "from": "cluster", "key": key, "why": "not known on this node"}
        return {"name": names.text(labels), **_shown(found)}


def _shown(found: Found) -> dict[str, Any]:
    records = [_text(kind, rdata) for kind, all_of_it in found.records.items() for rdata in all_of_it]
    status = "answer" if records else "NODATA" if found.exists else "NXDOMAIN"
    said = {"job": found.job, "why": found.why, "ttl": found.ttl, "records": records}
    return {"from": "names", "zone": names.text(found.zone), "status": status, **said}


def _text(kind: int, rdata: bytes) -> str:
    of_type = RdataType(kind)
    return f"{to_text(of_type)} {dns.rdata.from_wire(IN, of_type, rdata, 0, len(rdata)).to_text()}"
