"""What a worker does beside single packets: batches, failing system calls, tables that change, flows that age."""

from __future__ import annotations

import ipaddress
import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from appliance import limits
from appliance.dataplane import flow, libc, misses, state
from appliance.dataplane.steering import steer
from appliance.observe.counters import Count
from appliance.tables import layout, read
from tests.dataplane.path import CAPACITY, CompiledPath
from tests.oracle import build
from tests.oracle.model import Host, Service, World

PLAIN = bytes(10)
SERVICE = "10.30.30.30"
CLIENT, NEAR, FAR, OTHER = "10.18.0.2", "10.18.0.3", "10.18.0.66", "10.18.0.130"
SECOND = 1_000_000_000
TCP_SYN, TCP_ACK, TCP_RST = 0x02, 0x10, 0x04


def world(*backends: str, far_node: str = "192.0.2.2", without: str = "") -> World:
    hosts = [
        Host(CLIENT, "192.0.2.1", 50103, "10.30.0.1"),
        Host(NEAR, "192.0.2.1", 50103, "10.30.0.3"),
        Host(FAR, far_node, 50103, "10.30.0.2"),
        Host(OTHER, "192.0.2.3", 50103, "10.30.0.4"),
    ]
    services = [Service(SERVICE, "rr", list(backends or (FAR,)))]
    services += [Service(h.instance_ip or "", "instance", [h.address]) for h in hosts]
    return World("192.0.2.1", 50103, [h for h in hosts if h.address != without], services, ["10.30.0.0/16"])


def ip(source: str, destination: str, protocol: int, body: bytes, number: int = 1) -> bytes:
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), number, 0x4000, 64, protocol, 0) + addresses + body


def udp(source: str, destination: str, sport: int = 4000, dport: int = 80, data: bytes = b"hello") -> bytes:
    return ip(source, destination, 17, struct.pack("!HHHH", sport, dport, 8 + len(data), 0) + data)


def tcp(source: str, destination: str, sport: int = 4000, dport: int = 80, flags: int = TCP_ACK) -> bytes:
    return ip(source, destination, 6, struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 65_535, 0, 0))


def target(payload: bytes) -> str:
    return str(ipaddress.IPv4Address(payload[16:20]))


def source(packet: bytes) -> str:
    return str(ipaddress.IPv4Address(packet[12:16]))


def send_many(path: CompiledPath, count: int, **changes: Any) -> Any:
    path.calls.tun_reads.extend(PLAIN + udp(CLIENT, SERVICE, **changes) for _ in range(count))
    return path.run()


def heat(path: CompiledPath) -> None:
    """Two wake-ups in a row make a stage hot: from then on it takes whole batches."""
    for _ in range(2):
        path.from_tun(PLAIN, udp(CLIENT, SERVICE))


# --- trains --------------------------------------------------------------------------------------------------------


def test_a_batch_of_equal_packets_leaves_as_one_train() -> None:
    path = CompiledPath(world())
    heat(path)
    outcome = send_many(path, 40)
    assert len(outcome.wire) == 40
    assert len(path.calls.sent) == 1
    assert path.calls.sent[0][4] == len(udp(CLIENT, SERVICE))


def test_a_train_ends_at_63_segments_and_at_a_shorter_packet() -> None:
    path = CompiledPath(world())
    heat(path)
    sizes = [b"x" * 20] * 5 + [b"y" * 10] + [b"x" * 20] * 3
    path.calls.tun_reads.extend(PLAIN + udp(CLIENT, SERVICE, data=data) for data in sizes)
    outcome = path.run()
    assert [packet[28:] for _, _, packet in outcome.wire] == sizes
    assert len(path.calls.sent) == 2
    heat(path)
    send_many(path, 64)
    assert [len(data) // size if size else 1 for *_, data, size in path.calls.sent] == [63, 1]


def test_eio_clears_the_offload_and_sends_the_run_again() -> None:
    path = CompiledPath(world())
    heat(path)
    path.calls.fail_send = lambda fd, data, size: libc.EIO if size else 0
    assert len(send_many(path, 10).wire) == 10
    assert path.count(Count.GSO_REFUSED) == 1
    heat(path)
    assert len(send_many(path, 10).wire) == 10
    assert path.count(Count.GSO_REFUSED) == 1  # no second attempt
    assert path.worker.record[0]["state"]["udp_gso"][0] == 0


@pytest.mark.parametrize("code", [libc.EINVAL, libc.EMSGSIZE])
def test_a_refused_train_goes_out_packet_by_packet_and_the_offload_stays(code: int) -> None:
    path = CompiledPath(world())
    heat(path)
    path.calls.fail_send = lambda fd, data, size: code if size else 0
    assert len(send_many(path, 5).wire) == 5
    assert path.worker.record[0]["state"]["udp_gso"][0] == 1


def test_a_send_that_fails_is_counted_and_nothing_else_is_lost() -> None:
    path = CompiledPath(world())
    path.calls.fail_send = lambda fd, data, size: libc.ENOBUFS
    assert path.from_tun(PLAIN, udp(CLIENT, SERVICE)).drops == {"send-failed": 1}
    path.calls.fail_send = lambda fd, data, size: 0
    assert len(path.from_tun(PLAIN, udp(CLIENT, SERVICE)).wire) == 1


def test_a_write_that_fails_is_counted() -> None:
    path = CompiledPath(world())
    path.calls.fail_write = lambda data: libc.EINVAL
    outcome = path.from_wire(("192.0.2.2", 50103), udp("10.30.0.2", CLIENT))
    assert (outcome.tun, outcome.drops) == ([], {"tun-write-failed": 1})


def test_an_empty_datagram_is_malformed() -> None:
    assert CompiledPath(world()).from_wire(("192.0.2.2", 50103), b"").drops == {"malformed": 1}


# --- source ports and siblings -------------------------------------------------------------------------------------


def test_the_receivers_hash_chooses_the_source_port() -> None:
    sources = (20, 21, 22, 23, 24)
    path = CompiledPath(world(), sources=sources)
    used = set()
    for sport in range(4000, 4032):
        path.from_tun(PLAIN, udp(CLIENT, SERVICE, sport=sport))
        expected = sources[steer(*layout.words(FAR), sport, 80) % len(sources)]
        assert path.calls.sent[0][0] == expected
        used.add(expected)
    assert used == set(sources)


def test_without_source_ports_everything_leaves_from_the_tunnel_port() -> None:
    path = CompiledPath(world())
    path.from_tun(PLAIN, udp(CLIENT, SERVICE))
    assert path.calls.sent[0][0] == 4


def owner(address: str, sport: int, dport: int) -> int:
    return int(steer(*layout.words(address), sport, dport)) % 2


def test_a_packet_of_a_siblings_flow_is_handed_over_once() -> None:
    path = CompiledPath(world(), workers=2, handoff_ports=(777,))
    sport = next(p for p in range(4000, 4100) if owner(CLIENT, 80, p) == 1)
    packet = udp("10.30.0.2", CLIENT, 80, sport)
    outcome = path.from_wire(("192.0.2.2", 50103), packet)
    assert outcome.wire == [("127.0.0.1", 50103, packet)]
    assert path.calls.sent[0][0] == 5
    assert path.count(Count.HANDED_OVER) == 1
    passed_on = path.from_wire(("127.0.0.1", 777), packet)
    assert (len(passed_on.tun), passed_on.wire) == (1, [])
    assert path.from_wire(("127.0.0.1", 778), packet).drops == {"unknown-peer": 1}  # not a sibling's port: not trusted


def test_a_local_delivery_goes_to_the_owner_of_its_other_end() -> None:
    path = CompiledPath(world(NEAR), workers=2)
    mine = next(p for p in range(4000, 4100) if owner(NEAR, p, 80) == 0)
    theirs = next(p for p in range(4000, 4100) if owner(NEAR, p, 80) == 1)
    assert len(path.from_tun(PLAIN, udp(CLIENT, SERVICE, mine)).tun) == 1
    handed = path.from_tun(PLAIN, udp(CLIENT, SERVICE, theirs)).wire
    assert [(address, target(packet)) for address, _, packet in handed] == [("127.0.0.1", NEAR)]


# --- tables that change --------------------------------------------------------------------------------------------


def test_a_flow_whose_instance_is_removed_moves_with_its_next_packet() -> None:
    path = CompiledPath(world(FAR, OTHER))
    assert target(path.from_tun(PLAIN, udp(CLIENT, SERVICE)).wire[0][2]) == FAR
    path.learn(world(FAR, OTHER, without=FAR))
    assert target(path.from_tun(PLAIN, udp(CLIENT, SERVICE)).wire[0][2]) == OTHER
    assert path.count(Count.FLOWS_MOVED) == 1


def test_an_address_that_got_another_instance_is_another_backend() -> None:
    path = CompiledPath(world())
    path.from_tun(PLAIN, udp(CLIENT, SERVICE))
    known = world()
    hosts = [replace(h, instance_ip="10.30.0.77") if h.address == FAR else h for h in known.hosts]
    path.learn(replace(known, hosts=hosts))
    path.from_tun(PLAIN, udp(CLIENT, SERVICE))
    answer = path.from_wire(("192.0.2.2", 50103), udp("10.30.0.77", CLIENT, 80, 4000))
    assert source(answer.tun[0][1]) == SERVICE


def test_a_flow_stays_when_its_node_gets_another_address() -> None:
    path = CompiledPath(world(FAR, OTHER))
    path.from_tun(PLAIN, udp(CLIENT, SERVICE))
    path.learn(world(FAR, OTHER, far_node="192.0.2.200"))
    address, _, packet = path.from_tun(PLAIN, udp(CLIENT, SERVICE)).wire[0]
    assert (address, target(packet)) == ("192.0.2.200", FAR)
    assert path.count(Count.FLOWS_MOVED) == 0


def test_a_container_that_is_removed_can_no_longer_send() -> None:
    path = CompiledPath(world())
    path.from_tun(PLAIN, udp(CLIENT, SERVICE))
    path.learn(world(without=CLIENT))
    assert path.from_tun(PLAIN, udp(CLIENT, SERVICE)).drops == {"spoofed-source": 1}
    assert path.from_wire(("192.0.2.2", 50103), udp("10.30.0.2", CLIENT, 80, 4000)).drops == {"not-local": 1}


# --- flows that age ------------------------------------------------------------------------------------------------


def fill(path: CompiledPath, count: int, make: Any = udp) -> None:
    for sport in range(count):
        path.from_tun(PLAIN, make(CLIENT, SERVICE, 1_000 + sport))


def test_an_unanswered_flow_ends_after_its_time() -> None:
    path = CompiledPath(world())
    fill(path, 10)
    assert path.count(Count.FLOWS_LIVE) == 10
    path.calls.now += 31 * SECOND
    path.run()
    assert (path.count(Count.FLOWS_LIVE), path.count(Count.FLOWS_EXPIRED)) == (0, 10)


def test_an_answered_flow_lives_longer_and_an_established_one_for_hours() -> None:
    path = CompiledPath(world())
    path.from_tun(PLAIN, udp(CLIENT, SERVICE, 1))
    path.from_wire(("192.0.2.2", 50103), udp("10.30.0.2", CLIENT, 80, 1))
    path.from_tun(PLAIN, tcp(CLIENT, SERVICE, 2, flags=TCP_SYN))
    path.from_wire(("192.0.2.2", 50103), tcp("10.30.0.2", CLIENT, 80, 2, flags=TCP_SYN | TCP_ACK))
    for seconds, alive in ((100, 2), (100, 1), (7_000, 1), (500, 0)):
        path.calls.now += seconds * SECOND
        path.run()
        assert path.count(Count.FLOWS_LIVE) == alive, seconds


def test_a_reset_connection_goes_soon() -> None:
    path = CompiledPath(world())
    path.from_tun(PLAIN, tcp(CLIENT, SERVICE, 2))
    path.from_wire(("192.0.2.2", 50103), tcp("10.30.0.2", CLIENT, 80, 2, flags=TCP_RST))
    path.calls.now += 11 * SECOND
    path.run()
    assert path.count(Count.FLOWS_LIVE) == 0


def establish(path: CompiledPath, sport: int) -> None:
    path.from_tun(PLAIN, tcp(CLIENT, SERVICE, sport, flags=TCP_SYN))
    path.from_wire(("192.0.2.2", 50103), tcp("10.30.0.2", CLIENT, 80, sport, flags=TCP_SYN | TCP_ACK))


def test_a_flood_never_evicts_an_established_connection() -> None:
    path = CompiledPath(world(), flows=64)
    for sport in range(1, 33):
        establish(path, sport)
    fill(path, 500)
    assert path.count(Count.FLOWS_LIVE) == 64
    kept = {int(r["local_port"]) for r in path.records if r["protocol"] == flow.TCP and r["state"] == flow.ANSWERED}
    assert kept == set(range(1, 33))
    assert path.count(Count.FLOWS_EVICTED) == 500 - 32


def test_connections_side_by_side_do_not_keep_a_new_flow_out() -> None:
    path = CompiledPath(world(), flows=4 * limits.EVICT_SCAN)
    for sport in range(1, 3 * limits.EVICT_SCAN):
        establish(path, sport)
    for sport in range(2 * limits.EVICT_SCAN):
        assert path.from_tun(PLAIN, udp(CLIENT, SERVICE, 10_000 + sport)).drops == {}
    assert path.count(Count.FLOWS_EVICTED) == limits.EVICT_SCAN - 1


def test_a_table_full_of_connections_refuses_a_new_flow_and_says_so() -> None:
    path = CompiledPath(world(), flows=16)
    for sport in range(1, 17):
        establish(path, sport)
    for packet, protocol in ((udp(CLIENT, SERVICE), build.ICMP), (tcp(CLIENT, SERVICE, flags=TCP_SYN), build.TCP)):
        outcome = path.from_tun(PLAIN, packet)
        assert outcome.drops == {"flow-table-full": 1}
        ((_, told),) = outcome.tun
        assert (told[9], told[16:20]) == (protocol, ipaddress.ip_address(CLIENT).packed)


def test_an_error_finds_no_flow_whose_time_is_over_and_lengthens_none() -> None:
    path = CompiledPath(world())
    path.from_tun(PLAIN, udp(CLIENT, SERVICE, 4000))
    error = build.error("10.30.0.2", CLIENT, 3, 3, udp("10.30.0.1", FAR, 4000))
    path.calls.now += 29 * SECOND
    assert len(path.from_wire(("192.0.2.2", 50103), error).tun) == 1
    path.calls.now += 1 * SECOND - 1
    assert len(path.from_wire(("192.0.2.2", 50103), error).tun) == 1
    path.calls.now += 1
    path.worker.record["state"]["next_sweep"] = path.calls.now + SECOND  # not looked for yet
    assert path.from_wire(("192.0.2.2", 50103), error).drops == {"icmp-no-flow": 1}


def test_many_flows_come_and_go_without_losing_any() -> None:
    """The index is consistent after thousands of insertions and removals: each live flow is found by both keys."""
    path = CompiledPath(world(), flows=128)
    for turn in range(20):
        fill(path, 120)
        opened = path.count(Count.FLOWS_OPENED)
        fill(path, 120)
        assert path.count(Count.FLOWS_OPENED) == opened
        for sport in range(0, 120, 7):
            answer = path.from_wire(("192.0.2.2", 50103), udp("10.30.0.2", CLIENT, 80, 1_000 + sport))
            assert source(answer.tun[0][1]) == SERVICE
        path.calls.now += (200 + turn) * SECOND
        path.run()
        assert path.count(Count.FLOWS_LIVE) == 0


# --- replacement ---------------------------------------------------------------------------------------------------


def test_a_new_worker_takes_over_the_flows_of_the_old_one() -> None:
    path = CompiledPath(world(FAR, OTHER))
    establish(path, 7)
    chosen = target(path.from_tun(PLAIN, tcp(CLIENT, SERVICE, 7)).wire[0][2])
    successor = CompiledPath(world(FAR, OTHER), rr_start=1)
    successor.worker = state.make(
        state.Settings(system_calls=successor.calls.table),
        state.Descriptors(tun=3, wire=4, handoff=5, epoll=6),
        read.attach(path.publisher.descriptor(), CAPACITY),
        path.records,
        successor._announced,
        successor._control,
        successor.reports,
    )
    assert target(successor.from_tun(PLAIN, tcp(CLIENT, SERVICE, 7)).wire[0][2]) == chosen
    answer = successor.from_wire(("192.0.2.2", 50103), tcp("10.30.0.2", CLIENT, 80, 7))
    assert source(answer.tun[0][1]) == SERVICE
    assert successor.count(Count.FLOWS_OPENED) == 0


# --- what waits, and what is put together --------------------------------------------------------------------------

UNKNOWN = "10.30.30.99"
NODE = ("192.0.2.2", 50103)


def test_packets_that_waited_five_seconds_are_given_up_and_asked_about_once() -> None:
    path = CompiledPath(world())
    for sport in (1, 2, 3):
        assert path.from_tun(PLAIN, udp(CLIENT, UNKNOWN, sport)).drops == {}
    assert (path.count(Count.HELD), path.count(Count.MISSES)) == (3, 1)
    path.calls.now += 5 * SECOND
    assert path.run().drops == {"unknown-service": 3}


def test_a_full_ring_of_reports_loses_the_question_and_says_so() -> None:
    path = CompiledPath(world())
    path.reports[misses.HEAD] = path.reports[misses.TAIL] + limits.MISS_RING
    assert path.from_tun(PLAIN, udp(CLIENT, UNKNOWN)).drops == {}
    assert (path.count(Count.MISSES), path.count(Count.MISSES_LOST)) == (0, 1)
    path.calls.now += 5 * SECOND
    assert path.run().drops == {"unknown-service": 1}


def test_a_full_pool_keeps_no_more_and_is_free_again_afterwards() -> None:
    path = CompiledPath(world())
    fits = limits.HELD_SLOTS // limits.HELD_EACH
    for turn in range(2):
        for address in range(fits + 1):
            for sport in range(limits.HELD_EACH):
                drops = path.from_tun(PLAIN, udp(CLIENT, f"10.30.77.{address + 1}", sport)).drops
                assert drops == ({} if address < fits else {"unknown-service": 1}), (turn, address, sport)
        path.calls.now += 5 * SECOND
        assert path.run().drops == {"unknown-service": limits.HELD_SLOTS}
        path.calls.now += 2 * SECOND
        path.run()
        assert int(path.worker.record[0]["held_free"]) == limits.HELD_SLOTS


def test_a_send_that_is_too_big_for_the_path_is_reported() -> None:
    path = CompiledPath(world())
    path.calls.fail_send = lambda fd, data, size: libc.EMSGSIZE
    assert path.from_tun(PLAIN, udp(CLIENT, SERVICE)).drops == {"too-big": 1}
    kind, hi, lo = (int(word) for word in path.reports[misses.RECORDS : misses.RECORDS + 3])
    assert (kind, str(layout.address(hi, lo))) == (misses.TOO_BIG, NODE[0])


def test_a_datagram_in_pieces_reaches_the_sibling_that_owns_its_flow() -> None:
    owned = next(p for p in range(4000, 4100) if owner(CLIENT, p, 80) == 1)
    one, other = (CompiledPath(world(), index=n, workers=2, handoff_ports=(777, 778)) for n in range(2))
    whole = build.udp(CLIENT, SERVICE, owned, 80, bytes(200), fragment_flags=0)
    outcomes = [one.from_tun(PLAIN, piece) for piece in build.fragments(whole, 104)]
    ((address, port, handed),) = outcomes[1].wire
    assert (address, port, outcomes[0].wire) == ("127.0.0.1", 778, [])
    other.calls.handed.append((("127.0.0.1", 777), handed, 0))
    expected = build.udp("10.30.0.1", FAR, owned, 80, bytes(200), fragment_flags=0)
    assert [packet for *_, packet in other.run().wire] == build.fragments(expected, 104)
    other.calls.handed.append((("127.0.0.1", 999), handed, 0))  # not a sibling's port: not believed
    assert other.run().drops == {"malformed": 1}


# --- elephants and mice --------------------------------------------------------------------------------------------

TURN_NS = 60_000
"""What a turn with a full batch takes at least: 64 packets at a microsecond each."""


class Watched(deque[Any]):
    """A queue that tells of each read."""

    def __init__(self, items: Iterable[Any], on_read: Callable[[], None]) -> None:
        super().__init__(items)
        self._on_read = on_read

    def popleft(self) -> Any:
        self._on_read()
        return super().popleft()


@pytest.mark.parametrize("arrives", [1, 63, 64, 65, 200, 511])
def test_a_mouse_from_the_wire_waits_for_two_batches_of_an_elephant_at_most(arrives: int) -> None:
    """The rest of the batch that is under way, and one that begins before the worker looks."""
    path = CompiledPath(world())
    heat(path)
    reads, seen = 0, 0

    def read() -> None:
        nonlocal reads
        reads += 1
        if reads == arrives:
            path.calls.datagrams.append((("192.0.2.2", 50103), udp("10.30.0.2", CLIENT), 0))

    def written(_data: bytes) -> int:
        nonlocal seen
        seen = reads
        return 0

    path.calls.polls, path.calls.turn_ns, path.calls.fail_write = True, TURN_NS, written
    path.calls.tun_reads = Watched([PLAIN + udp(CLIENT, SERVICE)] * 1_000, read)
    path.run()
    assert reads == 1_000
    assert 0 <= seen - arrives <= 2 * limits.TUN_BATCH, (seen, reads)


@pytest.mark.parametrize("arrives", [1, 8, 9, 30, 63])
def test_a_mouse_from_a_container_waits_for_two_batches_of_an_elephant_at_most(arrives: int) -> None:
    path = CompiledPath(world())
    heat(path)
    reads, seen = 0, 0
    mouse = PLAIN + udp(CLIENT, SERVICE, sport=7777, data=b"mouse")

    def read() -> None:
        nonlocal reads
        reads += 1
        if reads == arrives:
            path.calls.tun_reads.append(mouse)

    def sent(_fd: int, data: bytes, _size: int) -> int:
        nonlocal seen
        if data.endswith(b"mouse"):
            seen = reads
        return 0

    path.calls.polls, path.calls.turn_ns, path.calls.fail_send = True, TURN_NS, sent
    path.calls.datagrams = Watched([(("192.0.2.2", 50103), udp("10.30.0.2", CLIENT), 0)] * 400, read)
    path.run()
    assert reads == 400
    assert 0 <= seen - arrives <= 2 * limits.WIRE_BATCH, (seen, reads)


# --- stages one by one ---------------------------------------------------------------------------------------------


def test_stages_that_are_called_one_by_one_do_what_the_loop_does() -> None:
    outcomes = []
    for by_stage in (False, True):
        path = CompiledPath(world())
        heat(path)
        path.calls.polls = True
        path.calls.tun_reads.extend(PLAIN + udp(CLIENT, SERVICE, data=b"x" * size) for size in (20, 20, 10, 20))
        path.calls.tun_reads.append(PLAIN + udp(CLIENT, "10.30.99.99"))
        path.calls.datagrams.extend([(("192.0.2.2", 50103), udp("10.30.0.2", CLIENT), 0)] * 20)
        outcomes.append(path.run(by_stage=by_stage))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].wire
    assert outcomes[0].tun


def test_a_worker_ends_while_its_stages_are_called_one_by_one() -> None:
    path = CompiledPath(world())
    path.run(by_stage=True)
    assert path.run().drops == {}
