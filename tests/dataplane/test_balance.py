"""How flows spread over instances, and what becomes of them when instances drain, leave or come back."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from appliance.dataplane.balance import sticky
from appliance.observe.counters import Count
from tests.dataplane.path import CompiledPath
from tests.dataplane.test_worker import PLAIN, SECOND, TCP_ACK, TCP_RST, TCP_SYN, target, tcp, udp
from tests.oracle.model import CLOSEST, LEAST_FLOWS, MAGLEV, ROUND_ROBIN, Host, Service, World

CLIENT, SERVICE = "10.18.0.2", "10.30.30.30"
TEN = [f"10.18.0.{n}" for n in range(66, 76)]
FLOWS = 10_000


def world(
    *backends: str,
    policy: str = ROUND_ROBIN,
    weights: tuple[int, ...] = (),
    without: str = "",
    **modifiers: Any,
) -> World:
    """A client here and ten instances on another node, of which some are behind the ServiceIP."""
    hosts = [Host(CLIENT, "192.0.2.1", 50103, "10.30.0.1")]
    hosts += [Host(it, "192.0.2.2", 50103, f"10.30.1.{n}") for n, it in enumerate(TEN) if it != without]
    service = Service(SERVICE, policy, list(backends or TEN), list(weights), **modifiers)
    own = [Service(it.instance_ip or "", "instance", [it.address]) for it in hosts]
    return World("192.0.2.1", 50103, hosts, [service, *own], ["10.30.0.0/16"])


def dial(path: CompiledPath, sport: int) -> str:
    """The instance that a TCP packet from a port reaches."""
    return target(path.from_tun(PLAIN, tcp(CLIENT, SERVICE, sport)).wire[0][2])


def spread(path: CompiledPath, flows: int = FLOWS) -> dict[int, str]:
    """The instance of each of many connections, by client port."""
    return {sport: dial(path, sport) for sport in range(1_000, 1_000 + flows)}


@pytest.mark.parametrize("start", [0, 1, 7])
def test_round_robin_is_even_within_two_percent(start: int) -> None:
    got = Counter(spread(CompiledPath(world(), flows=16_384, rr_start=start)).values())
    assert set(got) == set(TEN)
    assert all(abs(count / 1_000 - 1) <= 0.02 for count in got.values())


@pytest.mark.parametrize("policy", [ROUND_ROBIN, LEAST_FLOWS, MAGLEV])
def test_weights_are_kept_within_five_percent(policy: str) -> None:
    weights = (1, 2, 3, 4, 5, 5, 4, 3, 2, 1)
    path = CompiledPath(world(policy=policy, weights=weights, hash_port=policy == MAGLEV), flows=16_384)
    got = Counter(spread(path).values())
    for instance, weight in zip(TEN, weights, strict=True):
        share = got[instance] / FLOWS
        # A hash spreads by chance: three standard deviations of a binomial are allowed beside the five percent.
        chance = 3 * (weight / 30 * (1 - weight / 30) / FLOWS) ** 0.5 if policy == MAGLEV else 0
        assert abs(share - weight / 30) <= 0.05 * weight / 30 + chance, instance


def test_maglev_moves_less_than_15_percent_when_one_of_ten_leaves() -> None:
    known = world(policy=MAGLEV, hash_port=True)
    before = spread(CompiledPath(known, flows=16_384))
    for leaving in (TEN[0], TEN[4], TEN[9]):
        left = [it for it in TEN if it != leaving]
        after = spread(CompiledPath(world(*left, policy=MAGLEV, hash_port=True), flows=16_384))
        moved = sum(before[port] != after[port] for port in before)
        assert moved < 0.15 * FLOWS, leaving
        assert leaving not in after.values()


def test_maglev_chooses_alike_in_every_worker() -> None:
    path = CompiledPath(world(policy=MAGLEV, hash_port=True), flows=2_048)
    other = CompiledPath(world(*reversed(TEN), policy=MAGLEV, hash_port=True), flows=2_048, index=1, seed=99)
    assert spread(path, 1_000) == spread(other, 1_000)


def test_least_flows_evens_out_what_was_uneven() -> None:
    path = CompiledPath(world(policy=LEAST_FLOWS), flows=16_384)
    for sport in range(500):
        path.from_tun(PLAIN, tcp(CLIENT, "10.30.1.0", sport + 100))
    got = Counter(spread(path, 4_500).values())
    assert got[TEN[0]] < 50  # it has its share already
    rest = [got[it] for it in TEN[1:]]
    assert max(rest) - min(rest) < 25


def test_flows_are_counted_until_they_end_and_by_a_successor_too() -> None:
    path = CompiledPath(world(), flows=256)
    for sport in range(100):
        dial(path, 1_000 + sport)
    assert sorted(path.worker.loads[path.worker.loads > 0]) == [10] * 10
    path.worker.loads[:] = 99
    path.run()  # the loop begins by counting anew
    assert sorted(path.worker.loads[path.worker.loads > 0]) == [10] * 10
    path.calls.now += 40 * SECOND
    path.run()
    assert path.count(Count.FLOWS_LIVE) == 0
    assert not path.worker.loads.any()


def test_eviction_is_counted_too() -> None:
    path = CompiledPath(world(), flows=64)
    for sport in range(500):
        path.from_tun(PLAIN, udp(CLIENT, SERVICE, 1_000 + sport))
    assert int(path.worker.loads.sum()) == 64


# --- instances that leave ------------------------------------------------------------------------------------------


def connect(path: CompiledPath, sport: int) -> str:
    chosen = dial(path, sport)
    path.from_tun(PLAIN, tcp(CLIENT, SERVICE, sport, flags=TCP_SYN))
    answer = tcp(f"10.30.1.{TEN.index(chosen)}", CLIENT, 80, sport, flags=TCP_SYN | TCP_ACK)
    assert path.from_wire(("192.0.2.2", 50103), answer).tun
    return chosen


@pytest.mark.parametrize("policy", [ROUND_ROBIN, CLOSEST, LEAST_FLOWS, MAGLEV])
def test_a_drained_instance_keeps_its_connections_and_loses_its_datagrams_at_once(policy: str) -> None:
    both = TEN[:2]
    path = CompiledPath(world(*both, policy=policy, hash_port=True))
    held = {sport: connect(path, sport) for sport in range(1, 40)}
    assert set(held.values()) == set(both)
    talks = {p: target(path.from_tun(PLAIN, udp(CLIENT, SERVICE, p)).wire[0][2]) for p in range(1, 40)}
    assert set(talks.values()) == set(both)
    path.learn(world(*both, policy=policy, weights=(0, 1), hash_port=True))
    for sport, chosen in held.items():
        assert dial(path, sport) == chosen
    for sport in talks:
        assert target(path.from_tun(PLAIN, udp(CLIENT, SERVICE, sport)).wire[0][2]) == both[1]
    assert path.count(Count.FLOWS_MOVED) == list(talks.values()).count(both[0])
    assert {dial(path, sport) for sport in range(100, 140)} == {both[1]}


def test_a_call_to_the_instance_ip_of_a_drained_instance_stays() -> None:
    path = CompiledPath(world(*TEN[:2]))
    path.from_tun(PLAIN, udp(CLIENT, "10.30.1.0"))
    path.learn(world(*TEN[:2], weights=(0, 1)))
    assert target(path.from_tun(PLAIN, udp(CLIENT, "10.30.1.0")).wire[0][2]) == TEN[0]
    assert path.count(Count.FLOWS_MOVED) == 0


def test_an_instance_that_is_down_loses_its_connections_too() -> None:
    path = CompiledPath(world(*TEN[:2]))
    held = {sport: connect(path, sport) for sport in range(1, 9)}
    hosts = [replace(it, down=str(it.address) == TEN[0]) for it in path.catalogue.hosts.values()]
    services = [
        replace(it, weights=(0, 1)) if str(it.address) == SERVICE else it for it in path.catalogue.services.values()
    ]
    path.catalogue.replace(hosts, services)
    assert {dial(path, sport) for sport in held} == {TEN[1]}
    assert dial(path, 99) == TEN[1]


def test_a_datagram_flow_ends_with_its_service() -> None:
    """What follows waits, as for any address that nobody has told of."""
    path = CompiledPath(world())
    path.from_tun(PLAIN, udp(CLIENT, SERVICE))
    known = world()
    path.learn(replace(known, services=known.services[1:]))
    held = path.count(Count.HELD)
    outcome = path.from_tun(PLAIN, udp(CLIENT, SERVICE))
    assert (outcome.wire, outcome.drops, path.count(Count.HELD) - held) == ([], {}, 1)


@pytest.mark.parametrize("policy", [ROUND_ROBIN, CLOSEST, LEAST_FLOWS, MAGLEV])
def test_a_udp_client_that_never_stops_is_moved_with_its_first_packet_after_the_removal(policy: str) -> None:
    """A packet a millisecond for a second; its instance is removed in the middle, and no packet goes there after."""
    path = CompiledPath(world(policy=policy))
    seen: list[str] = []
    for millisecond in range(1_000):
        if millisecond == 500:
            path.learn(world(policy=policy, without=seen[-1]))
        path.calls.now += SECOND // 1_000
        seen.append(target(path.from_tun(PLAIN, udp(CLIENT, SERVICE)).wire[0][2]))
    assert len(set(seen[:500])) == len(set(seen[500:])) == 1
    assert seen[499] != seen[500]


def test_a_new_order_of_closest_leaves_flows_where_they_are() -> None:
    path = CompiledPath(world(*TEN[:2], policy=CLOSEST, near=1))
    assert target(path.from_tun(PLAIN, udp(CLIENT, SERVICE)).wire[0][2]) == TEN[0]
    path.learn(world(TEN[1], TEN[0], policy=CLOSEST, near=1))
    assert target(path.from_tun(PLAIN, udp(CLIENT, SERVICE)).wire[0][2]) == TEN[0]
    assert dial(path, 7) == TEN[1]
    assert path.count(Count.FLOWS_MOVED) == 0


# --- clients that come back ----------------------------------------------------------------------------------------


def test_a_sticky_client_keeps_its_instance_until_its_time_is_over() -> None:
    path = CompiledPath(world(sticky=60))
    assert {dial(path, 100 + n) for n in range(20)} == {TEN[0]}
    path.calls.now += 59 * SECOND
    assert dial(path, 200) == TEN[0]  # and its time begins anew
    path.calls.now += 59 * SECOND
    assert dial(path, 300) == TEN[0]
    path.calls.now += 61 * SECOND
    assert dial(path, 400) == TEN[1]


def test_a_sticky_client_leaves_an_instance_that_is_drained_or_gone() -> None:
    path = CompiledPath(world(*TEN[:3], sticky=60))
    first = dial(path, 100)
    path.learn(world(*TEN[:3], weights=(0, 1, 1), sticky=60))
    second = dial(path, 101)
    assert second != first
    path.learn(world(*TEN[:3], weights=(0, 1, 1), sticky=60, without=second))
    third = dial(path, 102)
    assert third not in (first, second)
    assert dial(path, 103) == third


def shared(table: np.ndarray, index: int) -> CompiledPath:
    """A worker whose table of sticky clients is the node's."""
    path = CompiledPath(world(sticky=60), rr_start=index)
    record = path.worker.record[0]
    record["sticky_at"], record["sticky_count"] = table.ctypes.data, len(table)
    return path


def test_workers_share_sticky_clients_and_a_torn_entry_is_none() -> None:
    table = np.zeros(sticky.SECTIONS[0][2], np.int64)
    one, other = shared(table, 0), shared(table, 1)
    chosen = dial(one, 100)
    assert dial(other, 200) == chosen
    for word in range(sticky.WORDS):  # a half-written entry, whichever half
        written = table.copy()
        at = int(np.flatnonzero(table)[0]) // sticky.WORDS * sticky.WORDS + word
        table[at] ^= 1 << 40
        assert dial(other, 300 + word) != chosen, word
        table[:] = written


def test_a_full_set_gives_up_the_client_that_would_end_first() -> None:
    words = np.zeros(sticky.SECTIONS[0][2], np.int64)
    path = shared(words, 0)
    dial(path, 100)
    at = int(np.flatnonzero(words)[0]) // sticky.WORDS * sticky.WORDS
    base = at // (sticky.WAYS * sticky.WORDS) * (sticky.WAYS * sticky.WORDS)
    words[:] = 0
    for way in range(sticky.WAYS):  # strangers, of which the third ends first
        entry = words[base + way * sticky.WORDS :][: sticky.WORDS]
        entry[:] = 7
        entry[6] = path.calls.now + (5 if way == 2 else 90) * SECOND
    dial(path, 200)
    clients = [int(words[base + way * sticky.WORDS]) for way in range(sticky.WAYS)]
    assert [it == 7 for it in clients] == [True, True, False, True]


def test_a_reset_connection_of_a_drained_instance_ends() -> None:
    path = CompiledPath(world(*TEN[:2]))
    chosen = connect(path, 5)
    path.learn(world(*TEN[:2], weights=tuple(int(it != chosen) for it in TEN[:2])))
    path.from_tun(PLAIN, tcp(CLIENT, SERVICE, 5, flags=TCP_RST))
    path.calls.now += 11 * SECOND
    path.run()
    assert path.count(Count.FLOWS_LIVE) == 0
    assert dial(path, 5) != chosen
