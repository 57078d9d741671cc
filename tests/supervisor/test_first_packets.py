"""Packets to what a node does not know yet: they wait, nobody else does, and each sender learns the outcome."""

import errno
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.supervisor.pair import CLIENTS, Pair
from tests.supervisor.sockets import PORT, connect, made, round_trips, say, tcp_echo, udp_server
from tests.supervisor.world import Node, until

pytestmark = pytest.mark.root

RETRANSMISSION_S = 1.0
"""After which a TCP opening is repeated (RFC 6298, section 2.1)."""
UNKNOWN = "10.30.99.99"
IP_RECVERR = 11  # ip(7); the socket module has it not


def counter(node: Node, name: str) -> int:
    """What a node's only worker has counted."""
    (worker,) = node.api.status()["workers"]
    return int(worker["counters"][name])


def asked(node: Node) -> int:
    """How many addresses the node has asked its cluster for, on behalf of packets."""
    return int(node.api.cluster()["misses"].get("missed", 0))


def test_a_first_call_waits_for_one_answer_and_loses_nothing(pair: Pair) -> None:
    """Nor does the answer: the server's node has not heard of the client, but of the packet that it sent."""
    with pair.service() as service, tcp_echo(service.container):
        before, held = asked(pair.two), counter(pair.two, "held")
        connection, took = connect(pair.client, service.address)
        with connection:
            assert say(connection, b"first") == b"first"
        assert took < RETRANSMISSION_S / 2
        assert asked(pair.two) == before + 1
        assert counter(pair.two, "held") == held + 1
        assert CLIENTS not in {it["job"] for it in pair.one.api.cluster()["interests"]}


def test_what_nobody_has_is_refused_at_once(pair: Pair) -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        connect(pair.client, UNKNOWN)
    assert time.monotonic() - began < RETRANSMISSION_S / 2
    with made(pair.client, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)  # otherwise a host that cannot be reached is no error to UDP
        sock.connect((UNKNOWN, PORT))
        sock.send(b"anybody?")
        with pytest.raises(OSError) as refused:  # noqa: PT011 -- which one is asserted
            sock.recv(1)
    assert refused.value.errno == errno.EHOSTUNREACH


@contextmanager
def silent(pair: Pair) -> Iterator[None]:
    """The manager does not answer; its broker does."""
    process = pair.manager.process.popen
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_slow_answer_delays_only_the_packets_that_need_it(pair: Pair, long: bool) -> None:
    """And those come in order once it is there, if that is before they were given up."""
    seconds, packets = (4.5, 60) if long else (1.5, 30)
    with (
        pair.service() as known,
        pair.service() as late,
        udp_server(known.container),
        udp_server(late.container) as got,
    ):
        assert round_trips(pair.client, known.address, 0.1)
        usual = round_trips(pair.client, known.address, seconds)
        with silent(pair), ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send_numbers, pair, late.address, packets, seconds / packets)
            meanwhile = round_trips(pair.client, known.address, seconds)
            sending.result()
            assert got == [], "nobody could tell where it is"
        until(lambda: len(got) == packets, "all are delivered")
    assert got == [b"%d" % number for number in range(packets)]
    assert statistics.median(meanwhile) < 2 * statistics.median(usual) + 0.0005
    assert percentile(meanwhile, 99) < 2 * percentile(usual, 99) + 0.005


def send_numbers(pair: Pair, address: str, count: int, pause: float) -> None:
    """Datagrams that say which they are."""
    with made(pair.client, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        for number in range(count):
            sock.send(b"%d" % number)
            time.sleep(pause)


def percentile(values: list[float], share: int) -> float:
    """The value that so many of a hundred do not exceed."""
    return sorted(values)[len(values) * share // 100]


def test_an_answer_finds_a_client_that_only_its_packet_told_of(pair: Pair) -> None:
    """The broker is away before the server's node could ask the cluster who calls."""
    with pair.service() as service, tcp_echo(service.container):
        assert pair.two.api.need(service.job)
        assert CLIENTS not in {it["job"] for it in pair.one.api.cluster()["interests"]}
        with pair.without_cluster():
            connection, took = connect(pair.client, service.address)
            with connection:
                assert say(connection, b"hello") == b"hello"
    assert took < RETRANSMISSION_S / 2
