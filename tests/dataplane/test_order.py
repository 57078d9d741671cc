"""Packets of a flow leave in the order in which they came, however many runs are open at a time (``run``).

Batches of packets of many flows, drawn at random, go through the compiled path: what leaves for each flow is compared
with what the oracle makes of them one by one, and the numbers in the payloads with the order of all sends, whichever
socket they leave from. A flow's packets come as datagrams that fit its path, as larger ones that may be fragmented on
the underlay and so leave from a socket of their own, and in pieces.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import pytest

from appliance import limits
from appliance.dataplane import libc
from appliance.dataplane.steering import steer
from appliance.observe.counters import Count
from appliance.tables import layout
from tests.dataplane.path import FRAGMENTING, HANDOFF, CompiledPath, cut
from tests.oracle import build
from tests.oracle.compare import comparable
from tests.oracle.model import Host, Node, Outcome, Service, World
from tests.oracle.oracle import Oracle
from tests.oracle.virtio import PLAIN

OWN = ("192.0.2.1", 50103)
NARROW, WIDE, MOVED = ("192.0.2.2", 50103), ("192.0.2.3", 50103), ("192.0.2.77", 50104)
MTU = 1_400
CLIENTS = [f"10.18.0.{number}" for number in (2, 3, 4)]
NEAR, FAR = "10.18.0.9", {"10.30.30.1": ("10.18.0.66", NARROW), "10.30.30.2": ("10.18.0.130", WIDE)}
SERVICES = tuple(FAR)
NEAR_SERVICE = "10.30.30.3"
SIZES = (10, 10, 10, 10, 30, 30, 1_300, 1_500)  # of payloads; the last is more than the path to NARROW takes
SIXTEEN = tuple(range(20, 20 + 16))
BATCH = limits.TUN_BATCH


def world(wide: tuple[str, int] = WIDE) -> World:
    """Two services, each with its instance on another node, one of them behind a narrow path; a third one is here."""
    hosts = [Host(address, *OWN, f"10.30.0.{number}") for number, address in enumerate([*CLIENTS, NEAR], 1)]
    far = [replace_node(address, node, wide) for address, node in FAR.values()]
    hosts += [Host(address, *node, f"10.30.0.{number}") for number, (address, node) in enumerate(far, 11)]
    services = [Service(service, "rr", [address]) for service, (address, _) in FAR.items()]
    services += [Service(NEAR_SERVICE, "rr", [NEAR])]
    services += [Service(it.instance_ip or "", "instance", [it.address]) for it in hosts]
    return World(*OWN, hosts, services, ["10.30.0.0/16"], nodes=[Node(*NARROW, mtu=MTU), Node(*wide)])


def replace_node(address: str, node: tuple[str, int], wide: tuple[str, int]) -> tuple[str, tuple[str, int]]:
    return address, wide if node == WIDE else node


@dataclass
class Flow:
    """A container's socket, and how many datagrams it has sent; each carries flow and number."""

    number: int
    client: str
    service: str
    sport: int
    sent: int = 0

    def next(self, size: int) -> bytes:
        """Its next datagram, one that may be fragmented on its way."""
        payload = struct.pack("!HI", self.number, self.sent) + bytes(size - 6)
        self.sent += 1
        return build.udp(self.client, self.service, self.sport, 80, payload, fragment_flags=0, ip_id=self.sent)


def reads(flow: Flow, choice: random.Random) -> list[bytes]:
    """A datagram as a container's kernel hands it over, now and then in two pieces."""
    packet = flow.next(choice.choice(SIZES))
    if len(packet) > MTU and choice.random() < 0.3:
        return build.fragments(packet, 800, ident=flow.sent)
    return [packet]


def batch(flows: list[Flow], choice: random.Random, size: int = BATCH) -> list[bytes]:
    """So many packets, at least, of flows in random turns."""
    packets: list[bytes] = []
    while len(packets) < size:
        packets += reads(choice.choice(flows), choice)
    return packets


def through(path: CompiledPath, packets: Iterable[bytes]) -> Outcome:
    """What the compiled path makes of packets that are all there at once, in whole batches."""
    path.calls.tun_reads.extend(PLAIN + packet for packet in packets)
    path.worker.record["state"]["tun_hot"] = 1
    return path.run()


def one_by_one(oracle: Oracle, packets: Iterable[bytes]) -> Outcome:
    """What the oracle makes of them."""
    made = [oracle.from_tun(PLAIN, packet) for packet in packets]
    return Outcome([it for each in made for it in each.wire], [it for each in made for it in each.tun])


def numbers(packets: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """Flow and number of each datagram, in order; of one in pieces its first counts."""
    for packet in packets:
        if struct.unpack_from("!H", packet, 6)[0] & 0x1FFF == 0:
            yield struct.unpack_from("!HI", packet, 28)


def check_order(seen: Iterable[tuple[int, int]], flows: list[Flow]) -> None:
    """All that each flow has sent is there, in order."""
    found: dict[int, list[int]] = {flow.number: [] for flow in flows}
    for number, count in seen:
        found[number].append(count)
    assert found == {flow.number: list(range(flow.sent)) for flow in flows}


def flows_to(services: Iterable[str], each: int = 8) -> list[Flow]:
    """So many flows of each client to each service."""
    ends = [(client, service, 4_000 + it) for client in CLIENTS for service in services for it in range(each)]
    return [Flow(number, *end) for number, end in enumerate(ends)]


@pytest.mark.parametrize("sources", [(), SIXTEEN[:5], SIXTEEN], ids=["tunnel-port", "5-sources", "16-sources"])
@pytest.mark.parametrize("offload", [True, False], ids=["trains", "packets"])
def test_flows_in_turns_leave_in_order(sources: tuple[int, ...], offload: bool) -> None:
    choice = random.Random(len(sources))
    path, oracle = CompiledPath(world(), sources=sources, udp_gso=offload), Oracle(world())
    flows, seen, used = flows_to(SERVICES), [], set()
    for turn in range(12):
        if turn % 4 == 3:  # a node gets another address and port, and has its own again
            for each in (path, oracle):
                each.learn(world(MOVED if turn % 8 == 3 else WIDE))
        packets = batch(flows, choice, BATCH if turn % 3 else 5 * BATCH)
        outcome = through(path, packets)
        assert comparable(outcome) == comparable(one_by_one(oracle, packets))
        seen += list(numbers(packet for *_, packet in outcome.wire))
        used |= {fd for fd, *_ in path.calls.sent}
    check_order(seen, flows)
    assert FRAGMENTING in used
    assert len(used) > 1 + len(sources) // 2


def test_a_flow_that_changes_its_socket_keeps_its_order() -> None:
    """Each large datagram may be fragmented and leaves from another socket than the small ones around it."""
    path = CompiledPath(world(), sources=SIXTEEN)
    narrow, wide = Flow(0, CLIENTS[0], SERVICES[0], 4_000), Flow(1, CLIENTS[0], SERVICES[1], 4_001)
    packets = [flow.next(size) for size in (10, 10, 1_500, 10, 1_500, 1_500, 10) for flow in (narrow, wide, narrow)]
    outcome = through(path, packets)
    check_order(numbers(packet for *_, packet in outcome.wire), [narrow, wide])
    of_narrow = [fd for fd, address, *_ in path.calls.sent if address == NARROW[0]]
    assert [fd == FRAGMENTING for fd, _ in groupby(of_narrow)] == [False, True, False, True, False]


def test_a_train_that_the_device_refuses_changes_no_order() -> None:
    choice = random.Random(7)
    path = CompiledPath(world(), sources=SIXTEEN)
    flows, refused = flows_to(SERVICES), iter([0, 0, 0, libc.EINVAL, 0, libc.EMSGSIZE, 0, libc.EIO])
    path.calls.fail_send = lambda _fd, _data, size: next(refused, 0) if size else 0
    outcome = through(path, batch(flows, choice, 4 * BATCH))
    assert path.count(Count.GSO_REFUSED) == 3
    check_order(numbers(packet for *_, packet in outcome.wire), flows)


def test_what_goes_to_a_sibling_leaves_in_order_beside_what_goes_to_nodes() -> None:
    choice = random.Random(1)
    path = CompiledPath(world(), sources=SIXTEEN, workers=2, handoff_ports=(777, 778))
    flows = [it for it in flows_to((*SERVICES, NEAR_SERVICE)) if owner(it.client, it.sport) == 0]
    packets = [choice.choice(flows).next(choice.choice(SIZES)) for _ in range(6 * BATCH)]
    outcome = through(path, packets)
    handed = [flow for flow in flows if flow.service == NEAR_SERVICE and owner(NEAR, flow.sport) == 1]
    beside = [flow for flow in flows if flow.service != NEAR_SERVICE]
    assert handed
    check_order(numbers(packet for fd, packet in sends(path) if fd == HANDOFF), handed)
    check_order(numbers(packet for fd, packet in sends(path) if fd != HANDOFF), beside)
    assert path.count(Count.HANDED_OVER) == sum(flow.sent for flow in handed)
    assert len(outcome.wire) == sum(flow.sent for flow in (*handed, *beside))


def test_answers_for_a_sibling_are_handed_over_in_order() -> None:
    choice = random.Random(2)
    path = CompiledPath(world(), sources=SIXTEEN, workers=2, handoff_ports=(777, 778))
    flows = [Flow(it, "10.30.0.12", CLIENTS[it % 3], 4_000 + it) for it in range(24)]
    theirs = [flow for flow in flows if owner(flow.service, flow.sport) == 1]
    assert 0 < len(theirs) < len(flows)
    for _ in range(4 * BATCH):
        path.calls.datagrams.append((WIDE, choice.choice(flows).next(choice.choice(SIZES)), 0))
    path.worker.record["state"]["wire_hot"] = 1
    path.run()
    check_order(numbers(packet for _, packet in sends(path)), theirs)


def owner(local: str, sport: int, workers: int = 2) -> int:
    """Which worker a flow with port 80 of a container of this node belongs to."""
    return int(steer(*layout.words(local), sport, 80)) % workers


def sends(path: CompiledPath) -> Iterator[tuple[int, bytes]]:
    """What left, packet by packet, with the socket that it left from."""
    for fd, _, _, datagram, size in path.calls.sent:
        for packet in cut(datagram, size):
            yield fd, packet


def test_flows_in_turns_leave_as_trains() -> None:
    """A packet of each flow in turn: as many sends as there are sockets and nodes, not as many as packets."""
    path = CompiledPath(world(), sources=SIXTEEN)
    flows = flows_to(SERVICES)
    packets = [flow.next(10) for flow in flows[::2]]
    assert len(packets) <= BATCH
    assert len(through(path, packets).wire) == len(packets)
    trains = {(fd, address) for fd, address, *_ in path.calls.sent}
    assert len(path.calls.sent) == len(trains) < len(packets)
