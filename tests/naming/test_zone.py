"""Decisions without sockets: the zone, the wire format, what waits, and mDNS."""

from random import Random
from typing import Any

import dns.flags
import dns.message
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.naming import multicast, names
from appliance.naming.multicast import Multicast
from appliance.naming.responder import Responder
from appliance.naming.service import Service
from appliance.naming.waiting import CALLERS_MAX, KEYS_MAX, Verdict, Waiting
from appliance.naming.zone import Found, Settings, Unknown, Zone
from tests.naming.driver import JOB, NAME, service

ONE, TWO = Service.from_wire(service()), Service.from_wire(service("shop.prod.WEB.test", 31))
A, AAAA = 1, 28


def zone(*services: Service, **settings) -> Zone:
    made = Zone(Settings(**settings))
    made.update(services, ())
    return made


def find(made: Zone, name: str) -> Any:
    return made.find(names.parse(name))


def test_jobs_that_differ_in_case_share_a_name_and_the_first_has_it() -> None:
    made = zone(ONE, TWO)
    found = find(made, NAME)
    assert isinstance(found, Found)
    assert found.job == "shop.prod.WEB.test"
    assert made.update([], ["shop.prod.WEB.test"]) == {JOB, "shop.prod.WEB.test"}
    assert found != find(made, NAME)


def test_names_between_services_and_zone_exist_as_long_as_a_service_does() -> None:
    made = zone(ONE)
    for name in ("test.shop.prod.local", "shop.prod.local", "prod.local"):
        assert find(made, name).exists
    made.update([], [JOB])
    assert not find(made, "prod.local").exists
    assert isinstance(find(made, NAME), Unknown)
    assert find(made, "example.org") is None


@pytest.mark.parametrize(
    ("when", "exists", "records"), [("address", True, True), ("nxdomain", False, False), ("nodata", True, False)]
)
def test_a_service_without_an_instance(when, exists, records) -> None:
    down = Service.from_wire(service(members=[[0, None, None, False]]))
    found = find(zone(down, when_down=when), NAME)
    assert (found.exists, A in found.records) == (exists, records)
    assert found.ttl == (1 if records else 0)


def reply_of(responder: Responder, query: dns.message.Message) -> dns.message.Message:
    data = responder.answer(query.to_wire(), lambda _: None, datagram=True)
    assert data is not None
    return dns.message.from_wire(data)


LABEL = st.binary(min_size=1, max_size=63)


@given(st.lists(LABEL, max_size=3), st.integers(0, 65535), st.booleans(), st.integers(0, 65535))
def test_whatever_is_asked_is_answered_as_the_library_reads_it(prefix, kind, edns, payload) -> None:
    """Twice the same: from the zone, and hot."""
    responder = Responder(Settings(), lambda key: None, lambda q, reply: None, lambda: 0.0, 2.0)
    responder.update([ONE], [])
    name = dns.name.Name((*prefix, *names.parse(NAME), b""))
    query = dns.message.make_query(name, kind, use_edns=0 if edns else None, payload=payload)
    wire = query.to_wire()
    first, second = (responder.answer(wire, lambda _: None, datagram=True) for _ in range(2))
    assert first == second
    if first is not None:
        reply = dns.message.from_wire(first)
        assert reply.id == query.id
        assert not reply.question or reply.question == query.question
        assert len(first) <= max(512, min(payload, 1232) if edns else 512)


@given(st.binary(max_size=300))
def test_no_bytes_raise(data) -> None:
    responder = Responder(Settings(), lambda key: None, lambda q, reply: None, lambda: 0.0, 2.0)
    responder.answer(data, lambda _: None, datagram=True)
    made = Multicast(responder.zone, lambda key: None, Random(1))
    made.received(data, ("10.18.0.2", 5353), 0.0)


def test_a_hot_answer_keeps_spelling_identity_and_flags() -> None:
    responder = Responder(Settings(), lambda key: None, lambda q, reply: None, lambda: 0.0, 2.0)
    responder.update([ONE], [])
    for spelled in (NAME, NAME.upper(), NAME.title()):
        query = dns.message.make_query(spelled, "A")
        query.flags |= dns.flags.CD
        reply = reply_of(responder, query)
        assert reply.id == query.id
        assert reply.flags == dns.flags.QR | dns.flags.AA | dns.flags.RD | dns.flags.RA | dns.flags.CD
        assert reply.question[0].name.to_text() == f"{spelled}."
    assert responder.counters["hot"] == 2
    responder.update([Service.from_wire(service(number=33))], [])
    reply = reply_of(responder, query)
    assert reply.answer[0][0].to_text() == "10.30.0.33"


def test_waiting_is_bounded_and_ends() -> None:
    asked: list[str] = []
    heard: list[Verdict] = []
    waiting = Waiting(asked.append, 2.0, 5.0)
    assert [waiting.join("a", heard.append, 0.0) for _ in range(CALLERS_MAX + 1)][-1] is Verdict.NO_ANSWER
    assert asked == ["a"]
    waiting.expire(1.9)
    assert heard == []
    waiting.expire(2.0)
    assert heard == [Verdict.NO_ANSWER] * CALLERS_MAX
    assert waiting.join("a", heard.append, 2.5) is Verdict.NO_ANSWER, "not asked again at once"
    for number in range(KEYS_MAX):
        waiting.join(f"k{number}", heard.append, 3.0)
    assert waiting.join("one more", heard.append, 3.0) is Verdict.NO_ANSWER
    assert "one more" not in asked


class Bridge:
    """A responder of mDNS, and a clock that the test turns."""

    def __init__(self) -> None:
        self.zone = zone(ONE)
        self.mdns = Multicast(self.zone, lambda key: None, Random(1))
        self.now = 100.0
        self.mdns.update([JOB], self.now)

    def wait(self, seconds: float) -> list[multicast.Heard]:
        """What is said meanwhile."""
        end, said = self.now + seconds, []
        while (deadline := self.mdns.deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            said += [multicast.read(it.data) for it in self.mdns.tick(self.now)]
        self.now = end
        return said

    def hear(self, data: bytes, port: int = 5353) -> list[multicast.Heard]:
        return [multicast.read(it.data) for it in self.mdns.received(data, ("10.18.0.2", port), self.now)]

    def ask(self, kind: str = "A", name: str = NAME, known: bytes = b"", count: int = 0) -> list[multicast.Heard]:
        query = dns.message.make_query(name, kind, flags=0)
        query.id = 0
        wire = bytearray(query.to_wire())
        wire[7] = count
        return self.hear(bytes(wire) + known)


def response(rdata: bytes, kind: int = A, authority: bool = False) -> bytes:
    record = multicast.Rr(names.parse(NAME), kind, rdata)
    counts = (0, 0, 1, 0) if authority else (0, 1, 0, 0)
    flags = 0 if authority else 0x8400
    return multicast._HEADER.pack(0, flags, *counts) + multicast._record(record, 120, 0x8000)


def test_a_name_is_probed_announced_and_held() -> None:
    bridge = Bridge()
    assert bridge.ask() == [], "not ours yet"
    said = bridge.wait(3)
    assert [bool(it.questions) for it in said] == [True] * 3 + [False] * 2
    (answer,) = bridge.ask()
    assert answer.known[0][0].rdata == bytes((10, 30, 0, 30))
    goodbye = [multicast.read(it.data) for it in bridge.mdns.goodbye()]
    assert {ttl for it in goodbye for _, ttl in it.known} == {0}


def test_who_has_a_name_keeps_it_and_we_try_again_later() -> None:
    bridge = Bridge()
    bridge.wait(0.3)
    bridge.hear(response(bytes((10, 18, 0, 9))))
    assert bridge.wait(30) == []
    assert bridge.ask() == []
    assert bridge.mdns.counters["conflicts"] == 1
    assert len(bridge.wait(40)) == 5


def test_a_held_name_that_another_claims_is_probed_again() -> None:
    bridge = Bridge()
    bridge.wait(3)
    bridge.hear(response(bytes((10, 30, 0, 30))))
    assert bridge.wait(5) == [], "the same data is no conflict"
    bridge.hear(response(bytes((10, 18, 0, 9))))
    assert [bool(it.questions) for it in bridge.wait(5)] == [True] * 3 + [False] * 2


def test_of_two_that_probe_the_later_data_wins() -> None:
    bridge = Bridge()
    bridge.wait(0.3)
    bridge.hear(response(b"\xff" * 16, AAAA, authority=True))
    assert bridge.mdns.counters["ties-lost"] == 1
    assert bridge.wait(0.9) == []


def test_known_answers_are_left_out_and_what_does_not_exist_is_said() -> None:
    bridge = Bridge()
    bridge.wait(5)
    known = multicast._record(multicast.Rr(names.parse(NAME), A, bytes((10, 30, 0, 30))), 100, 0)
    assert bridge.ask(known=known, count=1) == []
    (negative,) = bridge.ask("MX")
    assert negative.known[0][0].kind == 47, "NSEC"
