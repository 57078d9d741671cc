"""Captured packets: what the compiled path notes, who wants it, and that pcapng's readers agree."""

from io import BytesIO
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from pcapng import FileScanner
from pcapng.blocks import EnhancedPacket

from appliance import limits
from appliance.dataplane import capture, memory, misses
from appliance.observe import packets
from appliance.observe.capture import INTERFACES, Captured, Filter, Pcapng, Ring
from tests.dataplane.path import CompiledPath
from tests.oracle.virtio import PLAIN
from tests.packets.world import ALICE, AWAY, BOB, NODE_B, OUTSIDE, WORLD

FROM, TO, CAME, WENT = capture.FROM_CONTAINER, capture.TO_NODE, capture.FROM_NODE, capture.TO_CONTAINER


class Captures(CompiledPath):
    """A path whose supervisor captures; its ring is read at the start of the next batch, as it is published there."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(WORLD, **settings)
        self.words = np.zeros(misses.SECTIONS[0][2], np.int64)
        self.worker.record[0]["misses_at"] = self.words.ctypes.data
        self.ring = Ring(0, self.words)
        self.capture(1)

    def capture(self, value: int) -> None:
        self._control[memory.CAPTURE] = value

    def taken(self) -> list[Captured]:
        self.run()
        return list(self.ring.take())


def packet(destination: str, size: int = 0, family: int = 0) -> bytes:
    return packets.build(ip_address(ALICE.ns[family]), ip_address(destination), "udp", 4000, 53, size)


def test_both_sides_of_a_translation_are_noted() -> None:
    path = Captures()
    path.from_tun(PLAIN, packet(AWAY[0]))
    before, after = path.taken()
    assert (before.kind, str(packets.read(before.data))) == (FROM, "udp 10.18.0.2:4000 → 10.30.30.1:53")
    assert (after.kind, str(packets.read(after.data))) == (TO, "udp 10.30.0.1:4000 → 10.18.0.66:53")
    assert after.comment() == "worker 0; to node 192.0.2.2:50103"
    answer = packets.build(ip_address(BOB.name[0]), ip_address(ALICE.ns[0]), "udp", 53, 4000)
    path.from_wire(NODE_B, answer)
    came, went = path.taken()
    assert (came.kind, came.data, came.comment()) == (CAME, answer, "worker 0; from node 192.0.2.2:50103")
    assert (went.kind, str(packets.read(went.data))) == (WENT, "udp 10.30.30.1:53 → 10.18.0.2:4000")


def test_a_drop_says_why_beside_the_packet() -> None:
    path = Captures()
    path.from_tun(PLAIN, packet(OUTSIDE[0]))
    dropped, told = path.taken()
    assert dropped.reason == "no-route"
    assert dropped.comment().startswith("worker 0; dropped, no-route: The destination is neither")
    assert (told.kind, told.reason) == (WENT, "")
    path.from_wire(("192.0.2.77", 1), packets.build(ip_address(OUTSIDE[0]), ip_address(ALICE.ns[0]), "udp", 1, 2))
    (stranger,) = path.taken()
    assert stranger.reason == "unknown-peer"


def test_nothing_is_noted_unless_it_is_wanted() -> None:
    path = Captures()
    path.run()
    path.capture(0)
    path.run()
    path.from_tun(PLAIN, packet(AWAY[0]))
    assert path.taken() == []
    assert path.words[misses.CAPTURE_AT + capture.HEAD] == 0
    path.capture(1)
    path.from_tun(PLAIN, packet(AWAY[0]))
    assert len(path.taken()) == 2


def test_a_reader_that_is_too_slow_loses_what_is_new() -> None:
    path = Captures()
    for _ in range(limits.CAPTURE_SLOTS // 2 + 10):
        path.from_tun(PLAIN, packet(AWAY[0]))
    assert len(path.taken()) == limits.CAPTURE_SLOTS
    assert path.ring.lost == 20
    path.from_tun(PLAIN, packet(AWAY[0]))
    assert len(path.taken()) == 2


def test_a_large_packet_is_cut_and_its_length_kept() -> None:
    path = Captures()
    path.from_tun(PLAIN, packet(AWAY[0], 9_000))
    before, after = path.taken()
    assert [(it.length, len(it.data)) for it in (before, after)] == [(9_000, capture.ROOM)] * 2


def captured(data: bytes, kind: int = FROM, reason: str = "", time: int = 5) -> Captured:
    return Captured(3, time, kind, len(data), data, ip_address("2001:db8::3"), 50104, reason)


def test_pcapng_reads_back() -> None:
    file = Pcapng("node")
    late, early = captured(b"late", TO, time=9), captured(packet(AWAY[0]), reason="no-route")
    data = file.packets(()) + file.packets([late, early])
    blocks = list(FileScanner(BytesIO(data)))
    found = [it for it in blocks if isinstance(it, EnhancedPacket)]
    assert [it.interface_id for it in found] == [list(INTERFACES).index(FROM), list(INTERFACES).index(TO)]
    assert found[0].packet_data == packet(AWAY[0])
    assert found[0].options["opt_comment"].startswith("worker 3; dropped, no-route: ")
    assert found[1].options["opt_comment"] == "worker 3; to node [2001:db8::3]:50104"
    assert found[1].timestamp - found[0].timestamp == pytest.approx(4e-9, abs=1e-6)


A, B = frozenset({ip_address(ALICE.ns[0]), ip_address(ALICE.name[0])}), frozenset(map(ip_address, (AWAY[0], BOB.ns[0])))


@pytest.mark.parametrize(
    ("wanted", "is_wanted"),
    [
        (Filter(), True),
        (Filter(ends=(A,)), True),
        (Filter(ends=(A, B)), True),
        (Filter(ends=(B, A)), True),
        (Filter(ends=(A, A)), False),
        (Filter(ports=frozenset({53})), True),
        (Filter(ports=frozenset({53, 4000})), True),
        (Filter(ports=frozenset({54})), False),
        (Filter(protocols=frozenset({6})), False),
        (Filter(protocols=frozenset({17})), True),
        (Filter(drops=True), False),
    ],
)
def test_filter(wanted: Filter, is_wanted: bool) -> None:
    back = packets.build(ip_address(BOB.ns[0]), ip_address(ALICE.name[0]), "udp", 53, 4000)
    assert wanted.wants(captured(packet(AWAY[0]))) is is_wanted
    assert wanted.wants(captured(back)) is is_wanted
    assert Filter(drops=True).wants(captured(b"", reason="malformed"))
    assert not Filter(ends=(A,)).wants(captured(b"\x45"))
