"""Tunnel packets from a neighbour on the underlay who is no node, or takes a node's address (RFC 7348 section 7).

Each point of what is checked when a packet is taken out of the tunnel, in both families, and mutations of packets that
were good, judged by the oracle. Beside all of it a client of the other node calls the service without a break.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from appliance.config import Config
from appliance.lab.lifecycle import Lab
from appliance.observe import packets
from tests.conftest import ROOT
from tests.lab import mutations
from tests.lab.helpers import (
    FAMILIES,
    balanced,
    environment,
    instance_ip,
    line,
    namespace_ip,
    program,
    result,
    run,
    until,
)
from tests.oracle import build
from tests.oracle.build import ICMP, ICMPV6, echo, error, extended, fragments, tcp, udp
from tests.oracle.model import Host, Node, Service, World
from tests.oracle.oracle import Oracle
from tests.oracle.packet import read

pytestmark = pytest.mark.root

TIMES = 3
STRANGER, STRANGER_V6 = "198.18.99.99", "2001:db8::99:99"
TUNNEL_PORT = 50103
TOLD_S = 8.0
"""A packet whose sender the cluster may still name waits for the answer, 5 s at most, before it is dropped."""
MUTANTS, MUTANTS_LONG, AT_ONCE = 3_000, 1_000_000, 500
FRAGMENTS = {"fragment", "fragment-timeout"}
MARK = mutations.MARK
DESCRIBED = {"unknown-peer", "peer-spoof", "not-local", "nested-overlay"}
"""Reasons for which addresses and ports are enough; others are a matter of bytes (``tests/observe/test_trace.py``)."""


@dataclass(frozen=True)
class Case:
    """What is sent, as whom, and what becomes of each packet; `size`: of the segments that it claims to be made of."""

    reason: str
    inner: tuple[bytes, ...]
    source: str = ""  # node 1
    size: int = 0


class Attack:
    """Somebody on the underlay, what the containers of node 2 see, and what its workers say."""

    def __init__(self, lab: Lab, forger: subprocess.Popen[str], witnesses: list[subprocess.Popen[str]]) -> None:
        self.lab, self.node = lab, lab.plan.nodes[1]
        self.node1 = str(lab.plan.nodes[0].underlay_v4)
        self._forger, self._witnesses = forger, witnesses

    def send(self, source: str, size: int, packets: list[bytes]) -> None:
        """As datagrams, in one go."""
        inner = " ".join(it.hex() or "-" for it in packets)
        assert _ask(self._forger, f"{source} {size} {inner}") == "sent"

    def drops(self) -> Counter[str]:
        """What the workers of node 2 have dropped from the wire, by reason."""
        return sum((Counter(it["drops"]["wire"]) for it in self.workers()), Counter())

    def workers(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.lab.api(self.node).status()["workers"]
        return workers

    def pids(self) -> list[int]:
        return [it["pid"] for it in self.workers()]

    def seen(self) -> int:
        """How many forged packets have reached containers."""
        return sum(int(_ask(it, "")) for it in self._witnesses)

    def gateway(self, family: str) -> str:
        """Node 2's own address in the overlay."""
        version = "-4" if family == "v4" else "-6"
        (route,) = json.loads(run(self.lab, "web1", "ip", version, "-j", "route", "show", "default"))
        return str(route["gateway"])

    def world(self) -> World:
        """Node 2 as the oracle takes it: what its tables have."""
        api, network = self.lab.api(self.node), Config().network
        return World(
            str(self.node.underlay_v4),
            TUNNEL_PORT,
            [Host(it["address"], it["node"], it["port"], it["instance_ip"]) for it in api.hosts()],
            [Service(it["address"], it["policy"], it["backends"]) for it in api.services()],
            [str(it) for it in network.services],
            [Node(self.node1, TUNNEL_PORT)],
            [self.gateway(family) for family in FAMILIES],
            [str(it) for it in network.overlay],
        )


def _ask(child: subprocess.Popen[str], order: str) -> str:
    assert child.stdin is not None
    child.stdin.write(order + "\n")
    child.stdin.flush()
    return line(child)


@pytest.fixture(scope="module")
def attack(lab: Lab) -> Iterator[Attack]:
    """Beside it a client of node 1 calls node 2's instance, and no call fails."""
    (uplink,) = json.loads(run(lab, "node2", "ip", "-j", "link", "show", "uplink"))
    targets = lab.plan.nodes[1].underlay_v4, lab.plan.nodes[1].underlay_v6
    with ExitStack() as running:

        def start(member: str, *command: object) -> subprocess.Popen[str]:
            name, *arguments = command
            child = subprocess.Popen(
                lab.command(member, program(str(name), *arguments)),
                env=environment(lab),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            running.callback(child.wait)
            running.callback(child.kill)
            return child

        forger = start("underlay", "forger", "underlay", uplink["address"], *targets)
        witnesses = [start(it.name, "witness", "eth0", MARK.hex()) for it in lab.plan.containers if it.node.number == 2]
        caller = start("client1", "caller", instance_ip(lab, lab.plan.web[1], "v4"))
        assert [line(it) for it in (forger, *witnesses, caller)] == ["ready"] * (2 + len(witnesses))
        attack = Attack(lab, forger, witnesses)
        pids = attack.pids()
        yield attack
        assert attack.pids() == pids
        assert caller.stdin is not None
        caller.stdin.close()
        told = result(caller)
        assert (told["failures"], told["calls"] > 10) == ([], True)


# --- each point ----------------------------------------------------------------------------------------------------


def hello(source: str, target: str, port: int = 9) -> bytes:
    """A good packet, but for where it comes from and goes to."""
    return udp(source, target, 40_000, port, MARK)


def cases(attack: Attack) -> Iterator[tuple[str, Case]]:
    """All, by name."""
    lab, plan = attack.lab, attack.lab.plan
    for f, family in enumerate(FAMILIES):
        client, neighbour = (instance_ip(lab, plan.client(n), family) for n in (1, 2))
        web, far = (namespace_ip(lab, it, family) for it in (plan.web[1], plan.web[0]))
        gateway, service = attack.gateway(family), balanced(family)
        good = hello(client, web)

        def case(name: str, reason: str, *inner: bytes, _family: str = family, **more: Any) -> tuple[str, Case]:
            return f"{_family} {name}", Case(reason, inner, **more)

        outside = ("192.0.2.1", "2001:db8:9::1")[f]
        for source in (STRANGER, STRANGER_V6):
            told = (client, web, service, outside)
            yield case(f"from {source}", "unknown-peer", *(hello(it, web) for it in told), source=source)
        forged = (neighbour, web, gateway, service, outside, ("127.0.0.1", "::1")[f], ("224.0.0.1", "ff02::1")[f])
        yield case("from whom its node does not have", "peer-spoof", *(hello(it, web) for it in forged))
        special = (
            ("127.0.0.1", "224.0.0.1", "169.254.1.1", "255.255.255.255", "0.0.0.0"),
            ("::1", "ff02::1", "fe80::1", f"::ffff:{plan.nodes[1].underlay_v4}", "::"),
        )[f]
        uplink = str((plan.nodes[1].underlay_v4, plan.nodes[1].underlay_v6)[f])
        wrong = (*special, gateway, uplink, service, far)
        yield case("to what is no container here", "not-local", *(hello(client, it) for it in wrong))
        yield case("a tunnel packet inside", "nested-overlay", hello(client, web, TUNNEL_PORT))
        inexact = (good + MARK, good + b"\0", good[:-1], good[: len(good) // 2], good[:20], good[:1], b"")
        yield case("of a length that it does not have", "malformed", *inexact)
        yield case(
            "whose headers contradict each other",
            "malformed",
            bytes([good[0] ^ 0x30]) + good[1:],
            udp(client, web, 1, 9, MARK, udp_length=8),
            udp(client, web, 1, 9, MARK, udp_length=60_000),
            tcp(client, web, 1, 9, MARK, data_offset=4),
            tcp(client, web, 1, 9, data_offset=15),
        )
        kinds = ((5, 9, 13, 17), (133, 134, 135, 137))[f]
        yield case(
            "ICMP that changes its receiver's ways",
            "unsupported-protocol",
            *(echo(client, web, 1, MARK, kind=it) for it in kinds),
            build.ip(client, web, (ICMPV6, ICMP)[f], bytes([(128, 8)[f]]) + bytes(7) + MARK),
        )
        quote = udp(web, client, 9, 40_000, MARK)
        kind = ((3, 3), (1, 4))[f]
        yield case("an error about no flow", "icmp-no-flow", error(client, web, *kind, quote))
        overlapping = fragments(good, 8, ident=99)[0], fragments(good, 16, ident=99)[0]
        yield case("fragments that overlap", "fragment", *overlapping)
        if family == "v6":
            options = (60, bytes(6))
            yield case("more extension headers than anybody sends", "malformed", extended(good, *[options] * 5))
            yield case("a hop-by-hop header that is not the first", "malformed", extended(good, options, (0, bytes(6))))
            yield case(
                "an extension header beyond the end",
                "malformed",
                build.ip(client, web, 60, bytes([17, 200]) + bytes(6) + MARK),
                build.ip(client, web, 60, bytes([17])),
            )
            route = extended(good, (43, bytes([4, 1]) + bytes(20)))
            yield case("a route that has not ended", "unsupported-protocol", route)
        else:
            yield case(
                "an IPv4 header that is too short or too long",
                "malformed",
                udp(client, web, 1, 9, MARK, ihl=4),
                udp(client, web, 1, 9, MARK, ihl=15)[:50],
                udp(client, web, 1, 9, MARK, ip_length=20),
            )
        spoofed = hello(neighbour, web)
        yield case("in a train, each by itself", "peer-spoof", spoofed * 4, size=len(spoofed))
        yield case("a train whose segments are no packets", "malformed", good[:-2] * 4, size=len(good) - 2)
        yield case("one packet that claims to be a train", "malformed", good, size=len(good) // 2)


def datagrams(case: Case) -> int:
    """How many packets a case is."""
    return sum(-(-len(it) // case.size) if case.size else 1 for it in case.inner)


def test_what_no_node_would_send_reaches_nobody_and_is_counted(attack: Attack) -> None:
    every = dict(cases(attack))
    assert len(every) > 25
    seen = attack.seen()
    for name, case in every.items():
        before, expected = attack.drops(), Counter({case.reason: TIMES * datagrams(case)})
        attack.send(case.source or attack.node1, case.size, list(case.inner) * TIMES)
        until(lambda: sum((attack.drops() - before).values()) >= expected.total(), f"{name}: {expected}", TOLD_S)  # noqa: B023
        assert attack.drops() - before == expected, name
    assert attack.seen() == seen


def test_trace_says_the_same_of_those_that_can_be_described(attack: Attack, long: bool) -> None:
    """`appliance trace --from-node`, on the node that has just dropped such packets."""
    if not long:
        pytest.skip("a process for each question: only with --long")
    described = [it for _, it in cases(attack) if it.reason in DESCRIBED and not it.size]
    assert {it.reason for it in described} == DESCRIBED
    for case in described:
        meaning = packets.read(case.inner[0])
        assert meaning is not None
        asked: dict[str, Any] = {"source": str(meaning.source), "destination": str(meaning.destination)}
        asked |= {"protocol": "udp", "sport": meaning.source_port, "dport": meaning.destination_port, "ask": True}
        said = attack.lab.api(attack.node).trace({**asked, "from_node": case.source or attack.node1})
        assert said["verdict"] == case.reason, asked


def test_the_witness_sees_what_a_node_may_send(attack: Attack) -> None:
    """Or the test above would prove nothing."""
    seen, lab = attack.seen(), attack.lab
    good = hello(instance_ip(lab, lab.plan.client(1), "v4"), namespace_ip(lab, lab.plan.web[1], "v4"))
    attack.send(attack.node1, 0, [good] * TIMES)
    until(lambda: attack.seen() == seen + TIMES, f"{TIMES} packets arrive")
    attack.send(attack.node1, len(good), [good * 4])
    until(lambda: attack.seen() == seen + TIMES + 4, "a train of 4 arrives")


# --- mutations -----------------------------------------------------------------------------------------------------


def test_mutations_of_good_packets_reach_a_container_only_if_they_are_good(attack: Attack, long: bool) -> None:
    """The oracle says what becomes of each."""
    judge, random = Judge(attack), Random(20_201_2)
    for _ in range((MUTANTS_LONG if long else MUTANTS) // AT_ONCE):
        judge.round([judge.mutant(random) for _ in range(AT_ONCE)])
    assert judge.delivered > 0
    assert len(judge.expected) >= 5


class Judge:
    """Sends mutants, and compares what node 2 makes of them with what the oracle does.

    Fragments that never become whole are dropped in their time: of them only the number is known. What a worker writes
    into the TUN the node's kernel may still drop, as any router would: for a header checksum, a hop limit, an option.
    """

    def __init__(self, attack: Attack) -> None:
        self._attack, self._world = attack, attack.world()
        self._oracle = Oracle(self._world)
        self._before, self._seen = attack.drops(), attack.seen()
        self.expected: Counter[str] = Counter()
        self.delivered = self._sure = 0
        lab, plan = attack.lab, attack.lab.plan
        ends = [
            (instance_ip(lab, plan.client(1), family), namespace_ip(lab, plan.web[1], family)) for family in FAMILIES
        ]
        self._good = [packet for source, target in ends for packet in mutations.good(source, target)]

    def mutant(self, random: Random) -> bytes:
        """Of some good packet."""
        return mutations.mutant(random, random.choice(self._good))

    def round(self, packets: list[bytes]) -> None:
        """All of them, at once."""
        for packet in packets:
            self._predict(packet)
        self._attack.send(self._attack.node1, 0, packets)
        until(self._is_as_expected, f"{self.expected} and {self.delivered} delivered", 5.0)
        assert self._known_drops() == self.expected

    def _predict(self, packet: bytes) -> None:
        outcome = self._oracle.from_wire((self._attack.node1, TUNNEL_PORT), packet)
        marks = sum(data.count(MARK) for _, data in outcome.tun)
        known = Counter({reason: n for reason, n in outcome.drops.items() if reason not in FRAGMENTS})
        self.expected += known
        self.delivered += marks
        self._sure += sum(data.count(MARK) for _, data in outcome.tun if is_forwarded(data))

    def _known_drops(self) -> Counter[str]:
        drops = self._attack.drops() - self._before
        return Counter({reason: n for reason, n in drops.items() if reason not in FRAGMENTS})

    def _is_as_expected(self) -> bool:
        seen = self._attack.seen() - self._seen
        assert seen <= self.delivered
        return self._known_drops().total() >= self.expected.total() and seen >= self._sure


def is_forwarded(packet: bytes) -> bool:
    """Whether every router passes a packet on."""
    view = read(packet)
    return (
        packet[8] > 1 and view.l4 == 20 and view.header_valid if view.version == 4 else packet[7] > 1 and view.l4 == 40
    )
