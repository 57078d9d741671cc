"""What holds for any packet: both paths agree, what was right stays right, and nothing breaks the compiled path.

Each property runs a fixed number of examples, the same ones each time, so that all of them together stay well below a
minute and a commit fails or passes for what it changes. A search for new ones multiplies that number and draws anew:
PACKET_EXAMPLES=20 pytest tests/packets
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from tests.dataplane.path import CompiledPath
from tests.oracle.build import ACK, PSH, tcp
from tests.oracle.compare import check_from_wire, comparable, pieces, quotes_little
from tests.oracle.model import Host, Outcome, Service, World
from tests.oracle.oracle import Oracle
from tests.oracle.packet import ERROR, WHOLE, DropError, Packet, read
from tests.oracle.virtio import Vnet
from tests.packets import fixture, strategies
from tests.packets.fixture import Given, Learn, Step, Tun, Wire
from tests.packets.fixtures.coalesce import Stream
from tests.packets.fixtures.tso import data, tso
from tests.packets.fixtures.uso import uso
from tests.packets.strategies import OWN, Answer, Complain, Move, Redial
from tests.packets.test_fixtures import play
from tests.packets.world import AWAY, FOUR, NEAR, SIX, WORLD

FACTOR = int(os.environ.get("PACKET_EXAMPLES", "1"))


def bounded(examples: int) -> settings:
    """So many examples, without a deadline: the first call may compile."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(
        max_examples=examples * FACTOR, derandomize=FACTOR == 1, deadline=None, suppress_health_check=checks
    )


@dataclass
class Pair:
    """Both paths of the same world; they get the same inputs and must answer alike."""

    world: World
    start: int = 0

    def __post_init__(self) -> None:
        self.oracle = Oracle(self.world, self.start)
        self.compiled = CompiledPath(self.world, rr_start=self.start)
        self.seen: list[tuple[bytes, bool]] = []  # packet, delivered on this node
        self.calls: list[tuple[bytes, bool]] = []  # packet, False: what was read from the TUN

    def agree(self, given: Given) -> Outcome:
        """Both paths take the input and their outcomes compare equal; returns the compiled path's."""
        step = Step(given, ())
        expected, outcome = play(self.oracle, step), play(self.compiled, step)
        assert comparable(outcome) == comparable(expected), given
        if isinstance(given, Wire):
            for vnet, data in outcome.tun:
                check_from_wire(Vnet.unpack(vnet), data)
        self.seen += [(data, False) for _, _, data in expected.wire] + [(data, True) for _, data in expected.tun]
        if isinstance(given, Tun):
            self.calls.append((given.packet, False))
        for reason in expected.drops or ("passed",):
            event(reason)
        return outcome

    def resolve(self, move: Move) -> Given | None:
        """The input that a move stands for; None if there is nothing to answer or to call again."""
        if not isinstance(move, Answer | Redial | Complain):
            return move
        before: list[tuple[bytes, bool]] = self.calls if isinstance(move, Redial) else self.seen
        if not before:
            return None
        data, delivered = before[-1 - move.which % len(before)]
        try:
            packet = read(data)
        except DropError:
            return None
        if isinstance(move, Redial):
            return strategies.redialled(packet, move.dialled) if packet.kind == WHOLE else None
        if isinstance(move, Complain):
            return strategies.complaint(self.world, packet, delivered, move)
        if packet.kind != WHOLE:
            return None
        return strategies.answer_to(self.world, packet, delivered, move)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[World, int, list[Move]]:
    """A world, where its round robin starts, and what happens in it."""
    world = draw(strategies.worlds())
    return world, draw(st.integers(0, 3)), draw(strategies.conversations(world))


# The same tables once more, between a call to a node that has our address and its answer.
TWIN = ("192.0.2.1", 50104)
BEHIND_OUR_ADDRESS = World(
    *OWN,
    [Host("fc00::2", *OWN), Host("fc00::3", *TWIN, "fdff::3")],
    [Service("fdff:2000::", "rr", ["fc00::3"], [1])],
    ["fdff::/16"],
)
CALL = tcp("fc00::2", "fdff:2000::", 80, 80)


@bounded(300)
@given(conversations())
@example((BEHIND_OUR_ADDRESS, 0, [Tun(CALL), Learn(BEHIND_OUR_ADDRESS), Answer(0, b"", False)]))
def test_paths_agree(case: tuple[World, int, list[Move]]) -> None:
    """Any inputs one after the other: the oracle and the compiled path do the same."""
    world, start, moves = case
    pair = Pair(world, start)
    for move in moves:
        if (step := pair.resolve(move)) is not None:
            pair.agree(step)


@st.composite
def trains(draw: st.DrawFn) -> tuple[World, list[Wire]]:
    """A world and trains from the underlay."""
    world = draw(strategies.worlds())
    return world, draw(st.lists(strategies.make_trains(world), min_size=1, max_size=3))


@bounded(300)
@given(trains())
def test_trains_agree(case: tuple[World, list[Wire]]) -> None:
    """Trains of mixed flows arrive as their packets, merged only where the rules allow it."""
    world, given_trains = case
    pair = Pair(world)
    for train in given_trains:
        outcome = pair.agree(train)
        event(f"merged {sum(len(pieces(Vnet.unpack(v), data)) > 1 for v, data in outcome.tun) > 0}")


@st.composite
def sound_packets(draw: st.DrawFn) -> tuple[World, bytes, bool, tuple[str, int]]:
    """A world and a packet with valid checksums, from a container (True) or from the underlay."""
    world = draw(strategies.worlds())
    outward = draw(st.booleans())
    packet = draw(strategies.packets(world, outward=outward).filter(_all_valid))
    return world, packet, outward, draw(strategies.outer(world, packet))


def _all_valid(data: bytes) -> bool:
    try:
        packet = read(data)
    except DropError:
        return False
    return _sums_valid(packet)


def _sums_valid(packet: Packet) -> bool:
    return packet.header_valid and (packet.transport_valid or not packet.has_checksum)


# ICMP, without one byte of it, for a service that nobody answers for: the unreachable quotes 20 bytes.
EMPTY = bytes.fromhex("4500001400004000400008b90a1200020a1e1e00")
UNSERVED = World(*OWN, [Host("10.18.0.2", *OWN, "10.30.0.2")], [Service("10.30.30.0", "rr")], ["10.30.0.0/16"])


@bounded(200)
@given(sound_packets())
@example((UNSERVED, EMPTY, True, OWN))
def test_valid_checksums_stay_valid(case: tuple[World, bytes, bool, tuple[str, int]]) -> None:
    """A packet whose checksums are valid comes out with valid checksums."""
    world, data, outward, source = case
    path = CompiledPath(world)
    outcome = path.from_tun(Vnet().pack(), data) if outward else path.from_wire(source, data)
    assert all(_all_valid(packet) for _, _, packet in outcome.wire)
    assert all(_written_valid(Vnet.unpack(vnet), written) for vnet, written in outcome.tun)


def _written_valid(vnet: Vnet, written: bytes) -> bool:
    """All packets of a write are; an error may quote a packet that had less behind its IP header than `read` wants."""
    if quotes_little(written):
        l4, protocol = (20, written[9]) if written[0] >> 4 == 4 else (40, written[6])
        return _sums_valid(Packet(written, l4, protocol, ERROR))
    return all(_all_valid(packet) for packet in pieces(vnet, written))


NOISE_WORLD = World(*OWN)


@bounded(300)
@given(st.binary(max_size=120), st.binary(min_size=10, max_size=10), st.integers(0, 130), st.booleans())
def test_noise_breaks_nothing(noise: bytes, vnet: bytes, segment: int, outward: bool) -> None:
    """Any bytes from either side are dropped or passed as the oracle says."""
    Pair(NOISE_WORLD).agree(Tun(noise, vnet) if outward else Wire(noise, segment, strategies.NOBODY))


FAMILY = st.sampled_from([FOUR, SIX])


@bounded(40)
@given(
    FAMILY,
    st.booleans(),
    st.sampled_from([536, 1380, 9000, 60000]),
    st.integers(0, 65000),
    st.integers(0, 10),
)
def test_large_super_packets_agree(family: int, stream: bool, size: int, length: int, options: int) -> None:
    """Super-packets of up to 64 KiB are cut as the oracle cuts them, for another node and for this one."""
    pair = Pair(WORLD)
    payload = data(length)
    for dialled in (AWAY, NEAR):
        if stream:
            pair.agree(tso(family, payload, size, dialled=dialled, options=b"\1" * 4 * options))
        else:
            pair.agree(uso(family, payload, size, dialled=dialled))


@bounded(40)
@given(
    FAMILY,
    st.sampled_from([100, 536, 1452, 8000]),
    st.integers(1, 60000),
    st.lists(st.integers(0, 63), max_size=3),
)
def test_large_trains_agree(family: int, size: int, total: int, pushes: list[int]) -> None:
    """Trains of up to 64 KiB arrive whole, whichever packets end a run."""
    stream = Stream(family)
    starts = range(0, total, size)
    packets = [
        stream.packet(min(size, total - start), flags=ACK | PSH if index in pushes else ACK)
        for index, start in enumerate(starts)
    ]
    while sum(map(len, packets)) > 65507:  # what one UDP datagram can carry, RFC 768
        packets.pop()
    Pair(WORLD).agree(fixture.train(*packets))
