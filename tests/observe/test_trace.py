"""What `trace` says is what happens: every fixture of the packet path, step by step, against the path itself."""

from __future__ import annotations

import errno
from collections import Counter
from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest

from appliance.dataplane import misses, source, state
from appliance.observe import packets
from appliance.observe.counters import Drop
from appliance.observe.trace import DELIVERED, HELD, SENT, Answer, Node, Question, trace
from appliance.tables.catalogue import POLICIES
from tests.dataplane.path import CompiledPath
from tests.oracle import packet as oracle
from tests.oracle.model import Outcome
from tests.oracle.virtio import PLAIN
from tests.packets.fixture import Fixture, Refuse, Tun, Wire
from tests.packets.test_fixtures import EVERY, play
from tests.packets.world import ALICE, BOB, BOTH, NODE_B, WORLD

REFUSALS = (Drop.SEND_FAILED, Drop.TUN_WRITE_FAILED, Drop.FLOW_TABLE_FULL)
"""Reasons that no fixture has, as they are not a packet's alone: the tests named ``refusal`` below show them."""
_compared: Counter[str] = Counter()
_policies: Counter[tuple[str, bool]] = Counter()
"""With whether clients stay (``sticky``)."""


def node_of(path: CompiledPath) -> Node:
    """What the supervisor would show of a path's worker."""
    world = path.world
    settings = state.Settings(port=world.port, learn=source.MODES[world.learn_hosts], seed=0)
    return Node(
        path.worker.tables,
        {host.address: host for host in path.catalogue.hosts.values()},
        {service.address: service for service in path.catalogue.services.values()},
        tuple(ip_network(it) for it in world.service_ranges),
        [path.records],
        path.worker.sticky,
        settings,
    )


def is_private(path: CompiledPath) -> bool:
    """Whether the worker knows what nobody else can: learned hosts, packets that wait, fragments."""
    w = path.worker.record[0]
    return bool(w["learned"]["deadline"].any() or (w["waiting"]["state"] != misses.FREE).any()
                or w["state"][0]["collecting"] or (w["buckets"] != 0).any())  # fmt: skip


def seen(outcome: Outcome) -> str:
    """The verdict that an outcome means."""
    if outcome.drops:
        return next(iter(outcome.drops))
    return SENT if outcome.wire else DELIVERED if outcome.tun else HELD


def is_traceable(given: Tun | Wire) -> bool:
    """No super-packet, and no train."""
    return given.vnet == PLAIN if isinstance(given, Tun) else not given.segment


@pytest.mark.parametrize("fixture", EVERY)
def test_trace_says_what_then_happens(fixture: Fixture) -> None:
    path = CompiledPath(fixture.world)
    refused: Answer | None = None
    waiting: set[str] = set()  # for which reasons what is held may be dropped later
    for step in fixture.steps:
        answer: Answer | None = None
        given = step.given
        if isinstance(given, Tun | Wire) and is_traceable(given) and not is_private(path):
            answer = trace(node_of(path), question(given, path.calls.now))
            waiting |= set(answer.later) if answer.verdict == HELD else set()
            if answer.verdict == HELD and isinstance(given, Tun):
                refused = trace(node_of(path), question(given, path.calls.now, refused=True))
        outcome = play(path, step)
        if answer is not None:
            check(answer, outcome, node_of(path))
        elif refused is not None and isinstance(given, Refuse) and outcome.drops == {"unknown-service": 1}:
            check(refused, outcome, node_of(path))
        _compared.update(reason for reason in outcome.drops if reason in waiting)


def question(given: Tun | Wire, now: int, *, refused: bool = False) -> Question:
    """The one about what is given."""
    if isinstance(given, Tun):
        return Question(given.packet, refused=refused, now=now)
    return Question(given.payload, (ip_address(given.source[0]), given.source[1]), now=now)


def check(answer: Answer, outcome: Outcome, node: Node) -> None:
    assert answer.verdict == seen(outcome)
    _compared[answer.verdict] += 1
    if outcome.wire and answer.certain:
        assert answer.node is not None
        host, port, data = outcome.wire[0]
        assert answer.becomes == str(packets.read(data))
        assert answer.node in (f"{host}:{port}", f"[{host}]:{port}")
    elif outcome.wire:
        went = packets.read(outcome.wire[0][2])
        assert went is not None
        assert str(went.destination) in answer.candidates
    elif outcome.tun and answer.verdict == DELIVERED and answer.certain:
        assert answer.becomes == str(packets.read(outcome.tun[0][1]))
    if answer.replies:
        assert answer.replies == [str(packets.read(data)) for _, data in outcome.tun]
    if answer.flow is not None and answer.is_new:
        service = node.services.get(ip_address(answer.flow["dialled"]))
        if service is not None:
            _policies[service.policy, service.sticky > 0] += 1


def test_every_reason_and_policy_was_compared() -> None:
    """Of the run above; whoever runs this test alone has the fixtures played here."""
    if not _compared:
        for fixture in EVERY:
            test_trace_says_what_then_happens(cast(Fixture, fixture.values[0]))
    wanted = {reason.label for reason in Drop if reason and reason not in REFUSALS} | {SENT, DELIVERED, HELD}
    assert wanted - set(_compared) == set()
    assert {policy for policy, _ in _policies} == set(POLICIES)
    assert any(is_sticky for _, is_sticky in _policies)


def test_a_refusal_of_the_kernels_to_send_is_said_to_be_possible() -> None:
    path = CompiledPath(WORLD)
    path.calls.fail_send = lambda *_: errno.ENOBUFS
    answer = trace(node_of(path), Question(syn(1000), now=path.calls.now))
    assert (answer.verdict, answer.later) == (SENT, ["send-failed"])
    assert seen(tcp(path, 1000)) == "send-failed"


def test_a_refusal_of_the_kernels_to_deliver_is_said_to_be_possible() -> None:
    path = CompiledPath(WORLD)
    path.calls.fail_write = lambda _: errno.EIO
    packet = packets.build(ip_address(BOB.name[0]), ip_address(ALICE.ns[0]), "udp", 53, 4000)
    answer = trace(node_of(path), Question(packet, (ip_address(NODE_B[0]), NODE_B[1]), now=path.calls.now))
    assert (answer.verdict, answer.later) == (DELIVERED, ["tun-write-failed"])
    assert seen(path.from_wire(NODE_B, packet)) == "tun-write-failed"


def test_a_refusal_for_a_full_table_is_foreseen_and_changes_nothing() -> None:
    """Active TCP flows are never given up; a trace of one more changes none of them."""
    path = CompiledPath(WORLD, flows=4)
    for port in range(4):
        tcp(path, 1000 + port)
    path.records["state"] = 2  # answered
    before = path.records.copy()
    answer = trace(node_of(path), Question(syn(2000), now=path.calls.now))
    assert answer.verdict == "flow-table-full" == seen(tcp(path, 2000))
    assert (path.records == before).all()


def syn(port: int) -> bytes:
    return packets.build(ip_address(ALICE.ns[0]), ip_address(BOB.name[0]), "tcp", port, 80)


def tcp(path: CompiledPath, port: int) -> Outcome:
    return path.from_tun(PLAIN, syn(port))


def test_turns_are_said_to_be_turns_and_steps_are_sentences() -> None:
    path = CompiledPath(WORLD)
    packet = packets.build(ip_address(ALICE.ns[0]), ip_address(BOTH[0]), "udp", 4000, 53)
    answer = trace(node_of(path), Question(packet, now=path.calls.now))
    assert not answer.certain
    assert len(answer.candidates) == 2
    assert answer.steps[2].startswith("worker 0 opens a flow to 10.18.0.66, or by turns to 10.18.0.130")
    assert answer.steps[-1] == "sent to node 192.0.2.2:50103, 28 bytes inside the tunnel"
    path.from_tun(PLAIN, packet)
    answer = trace(node_of(path), Question(packet, now=path.calls.now))
    assert (answer.certain, answer.is_new) == (True, False)
    assert "it stays with 10.18.0.66" in answer.steps[2]


@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp", "sctp", "47"])
@pytest.mark.parametrize("family", [0, 1])
def test_a_made_packet_is_right(protocol: str, family: int) -> None:
    """As the oracle's parser sees it."""
    ends = ip_address(ALICE.ns[family]), ip_address(BOB.name[family])
    packet = packets.build(*ends, protocol, 1234, 80, 200)
    parsed = oracle.read(packet)
    assert parsed.transport_valid or protocol in ("sctp", "47")  # a CRC32c and none: nobody on the path looks at them
    assert parsed.header_valid
    assert len(packet) == 200
    assert packets.read(packet) is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("tcp", 1, 2, 30), "size"), (("nonsense", 1, 2, 0), "protocol"), (("256", 1, 2, 0), "protocol")],
)
def test_a_packet_that_cannot_be_is_refused(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}: expected"):
        packets.build(ip_address("10.0.0.1"), ip_address("10.0.0.2"), *arguments)
    with pytest.raises(ValueError, match="destination: expected"):
        packets.build(ip_address("10.0.0.1"), ip_address("fc00::1"), "tcp", 1, 2)
