"""Which node is nearest: simulated networks, no socket and no sleep."""

from __future__ import annotations

import random
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from appliance.dataplane.probe import ANSWER, LENGTH, REQUEST
from appliance.supervisor import nearest
from appliance.supervisor.rtt import Group, Node, RoundTrips
from appliance.tables.catalogue import Host, Service, choice_rows, choices, near_places
from appliance.tables.layout import address as address_of

A, B, C = ((ip_address(f"192.0.2.{n}"), 50103) for n in (2, 3, 4))
ALL: Group = frozenset({A, B, C})
Delay = Callable[[Node, float], float | None]


class Network:
    """Round trips over a simulated network: ``delay`` gives seconds, or None for a loss."""

    def __init__(self, delay: Delay, group: Group = ALL) -> None:
        self.delay, self.group, self.now, self.probes = delay, group, 0.0, 0
        self.trips = RoundTrips(chance=random.Random(1).random, tokens=lambda: self.probes.to_bytes(8, "big"))
        self.trips.follow([group], 0.0)
        self.changes: list[tuple[float, tuple[Node, ...]]] = []
        self._answers: list[tuple[float, Node, bytes]] = []

    def run(self, until: float) -> tuple[Node, ...]:
        """Lets time pass; gives the order at the end."""
        while (now := self._next()) <= until:
            self.now = now
            for answer in [it for it in self._answers if it[0] <= now]:
                self._answers.remove(answer)
                self.trips.received(answer[1], answer[2], now)
            probes, changed = self.trips.tick(now)
            if changed:
                self.changes.append((now, self.trips.order(self.group)))
            for probe in probes:
                self._send(probe.node, probe.payload)
        return self.trips.order(self.group)

    def _next(self) -> float:
        due = self.trips.deadline()
        assert due is not None
        return max(self.now, min([due, *(at for at, *_ in self._answers)]))

    def _send(self, node: Node, payload: bytes) -> None:
        assert payload.startswith(REQUEST)
        assert len(payload) == LENGTH
        self.probes += 1
        delay = self.delay(node, self.now)
        if delay is not None:
            self._answers.append((self.now + delay, node, ANSWER + payload[8:]))


def fixed(a: float | None, b: float | None, c: float | None) -> Delay:
    return lambda node, now: {A: a, B: b, C: c}[node]


def test_the_nearest_node_comes_first_after_a_few_probes() -> None:
    assert Network(fixed(0.03, 0.02, 0.01)).run(6) == (C, B, A)


def test_each_node_is_probed_about_once_a_second() -> None:
    network = Network(fixed(0.03, 0.02, 0.01))
    network.run(100)
    assert 270 <= network.probes <= 330


@pytest.mark.parametrize(("before", "after", "other"), [(0.005, 0.05, 0.01), (0.002, 0.02, 0.012), (0.009, 0.5, 0.02)])
def test_a_change_of_delay_is_followed_within_ten_seconds_and_once(before: float, after: float, other: float) -> None:
    network = Network(lambda node, now: (before if now < 30 else after) if node == A else other)
    assert network.run(30)[0] == A
    network.changes.clear()
    assert network.run(40)[0] != A
    network.run(300)
    assert len(network.changes) == 1


def test_a_small_change_is_not_followed() -> None:
    network = Network(lambda node, now: (0.010 if now < 30 else 0.013) if node == A else 0.0115)
    assert network.run(300)[0] == A


def test_noise_changes_nothing() -> None:
    """Two nodes alike within the noise, which is half as large as the delay: whoever is first stays so for an hour."""
    chance = random.Random(7)
    network = Network(lambda node, now: (0.2 if node == C else 0.010) * (1 + chance.uniform(-0.25, 0.25)))
    first = network.run(10)[0]
    network.changes.clear()
    assert network.run(3_600)[0] == first
    assert network.changes == []


def test_single_losses_change_nothing_and_three_in_a_row_do() -> None:
    def delay(node: Node, now: float) -> float | None:
        if node != A:
            return 0.02
        return None if int(now) % 10 == 5 or now > 200 else 0.010

    network = Network(delay)
    assert network.run(20)[0] == A
    network.changes.clear()
    assert network.run(200)[0] == A
    assert network.changes == []
    assert network.run(206)[0] == B


def test_a_node_that_never_answers_comes_last_and_stays_there() -> None:
    network = Network(fixed(None, 0.3, 0.2))
    assert network.run(10) == (C, B, A)
    network.changes.clear()
    assert network.run(600) == (C, B, A)
    assert network.changes == []


def test_nodes_that_never_answer_are_in_the_order_of_their_addresses() -> None:
    assert Network(fixed(None, None, None)).run(60) == (A, B, C)


def test_only_an_answer_to_the_open_probe_of_its_source_counts() -> None:
    trips = RoundTrips(chance=lambda: 0.5, tokens=lambda: b"12345678")
    trips.follow([frozenset({A})], 0.0)
    for now in (0.0, 1.0, 2.0):
        trips.tick(now)
        for source, payload in (
            (B, ANSWER + b"12345678"),
            (A, ANSWER + b"12345679"),
            (A, REQUEST + b"12345678"),
            (A, ANSWER + b"123456789"),
            (A, b""),
        ):
            trips.received(source, payload, now + 0.01)
    assert trips.times() == {A: None}
    trips.received(A, ANSWER + b"12345678", 2.95)  # too late
    assert trips.times() == {A: None}
    for now in (3.0, 4.0):
        trips.tick(now)
        trips.received(A, ANSWER + b"12345678", now + 0.01)
        trips.received(A, ANSWER + b"12345678", now + 0.02)  # once
    assert trips.times()[A] == pytest.approx(0.01)


def test_what_is_known_of_a_node_stays_when_the_groups_change() -> None:
    network = Network(fixed(0.03, 0.02, 0.01))
    network.run(5)
    network.trips.follow([frozenset({A, B})], 5.0)
    assert network.trips.order(frozenset({A, B})) == (B, A)
    network.trips.follow([], 5.0)
    assert network.trips.deadline() is None


# --- services ------------------------------------------------------------------------------------------------------

NEAR, FAR_A, FAR_B, FAR_B2 = (ip_address(f"10.18.0.{n}") for n in (2, 66, 130, 131))
S = ip_address("10.30.30.30")
HOSTS = [
    Host(NEAR, ip_address("192.0.2.1"), 50103, local=True),
    Host(FAR_A, *A),
    Host(FAR_B, *B),
    Host(FAR_B2, *B),
]
FIND = {it.address: it for it in HOSTS}.get


def arranged(service: Service, *order: Node) -> tuple[list[str], int]:
    """Choice list and near places of a service whose nodes are in this order."""
    (got,) = nearest.arrange(FIND, [service], lambda group: tuple(it for it in order if it in group))
    chosen = choices(got)
    rows = choice_rows([chosen])
    return [str(address_of(int(it["address_hi"]), int(it["address_lo"]))) for it in rows], near_places(got, chosen)


def test_the_own_node_comes_first_then_the_nearest() -> None:
    service = Service(S, "closest", (FAR_B, FAR_A, NEAR, FAR_B2))
    assert arranged(service, A, B) == ([str(it) for it in (NEAR, FAR_A, FAR_B, FAR_B2)], 1)
    assert nearest.groups(FIND, [service]) == {frozenset({A, B})}


def test_all_instances_of_the_nearest_node_take_turns_by_weight() -> None:
    service = Service(S, "closest", (FAR_A, FAR_B, FAR_B2), (1, 2, 1))
    assert arranged(service, B, A) == ([str(it) for it in (FAR_B, FAR_B2, FAR_B, FAR_A)], 3)


def test_an_instance_that_is_drained_makes_no_node_near() -> None:
    service = Service(S, "closest", (NEAR, FAR_A, FAR_B), (0, 1, 1))
    assert arranged(service, B, A) == ([str(FAR_B), str(FAR_A)], 1)


def test_other_policies_are_left_alone() -> None:
    service = Service(S, "rr", (FAR_B, NEAR))
    assert nearest.arrange(FIND, [service], lambda _: ()) == [service]
    assert nearest.groups(FIND, [service]) == set()
