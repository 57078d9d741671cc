"""What `trace` says is what happens: every fixture of the packet path, step by step, against the path itself."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from appliance.dataplane import misses, source, state
from appliance.observe import packets
from appliance.observe.counters import Drop
from appliance.observe.trace import DELIVERED, HELD, SENT, Answer, Node, Question, trace
from tests.dataplane.path import CompiledPath
from tests.oracle import packet as oracle
from tests.oracle.model import Outcome
from tests.oracle.virtio import PLAIN
from tests.packets.fixture import Fixture, Refuse, Tun, Wire
from tests.packets.test_fixtures import EVERY, play
from tests.packets.world import ALICE, BOB, BOTH, WORLD

NOT_OF_A_PACKET = {
    Drop.SEND_FAILED: "the kernel's",
    Drop.TUN_WRITE_FAILED: "the kernel's",
    Drop.FRAGMENT: "of the fragments before it",
    Drop.FRAGMENT_TIMEOUT: "of those that did not come",
    Drop.FLOW_TABLE_FULL: "below",
}
"""Reasons that no packet of a fixture shows by itself."""
_compared: Counter[str] = Counter()
_policies: set[str] = set()


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
    for step in fixture.steps:
        answer: Answer | None = None
        given = step.given
        if isinstance(given, Tun | Wire) and is_traceable(given) and not is_private(path):
            data = given.packet if isinstance(given, Tun) else given.payload
            sender = (ip_address(given.source[0]), given.source[1]) if isinstance(given, Wire) else None
            answer = trace(node_of(path), Question(data, sender, now=path.calls.now))
            if answer.verdict == HELD and isinstance(given, Tun):
                refused = trace(node_of(path), Question(data, sender, refused=True, now=path.calls.now))
        outcome = play(path, step)
        if answer is not None:
            check(answer, outcome, node_of(path))
        elif refused is not None and isinstance(given, Refuse) and outcome.drops == {"unknown-service": 1}:
            check(refused, outcome, node_of(path))


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
        _policies.add("" if service is None else service.policy)


def test_every_reason_and_policy_was_compared() -> None:
    """Of the run above: it is empty if the fixtures were not all played."""
    if sum(_compared.values()) < len(EVERY) / 2:
        pytest.skip("the fixtures did not run before this")
    wanted = {reason.label for reason in Drop if reason and reason not in NOT_OF_A_PACKET} | {SENT, DELIVERED, HELD}
    assert wanted - set(_compared) == set()
    assert _policies >= {"rr", "instance", "closest", "least-flows", "maglev"}


def test_a_full_table_is_foreseen_and_left_alone() -> None:
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
