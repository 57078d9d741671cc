"""What no client should send, and servers that are down."""

import random
import socket
import time

import pytest

from tests.naming.driver import GATEWAYS, NAME, Driver, resolver, service

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def names(make_netns):
    """A resolver whose upstream server is not there."""
    with resolver(make_netns, [service()], upstreams=["10.18.0.60"], upstream_timeout=1.0) as driver:
        yield driver


def works(names: Driver) -> bool:
    return names.dig("+short", NAME) == "10.30.0.30\n"


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((GATEWAYS[0], 53))
    return sock


def test_garbage_and_pointer_loops(names):
    loop = bytes.fromhex("1234 0100 0001 0000 0000 0000 c00c 0001 0001")
    chance = random.Random(1)

    def send() -> bytes:
        with udp() as sock:
            for size in range(200):
                sock.send(chance.randbytes(size))
            time.sleep(0.2)
            sock.setblocking(False)
            try:
                while True:
                    sock.recv(4096)
            except BlockingIOError:
                pass
            sock.setblocking(True)
            sock.settimeout(2)
            sock.send(loop)
            return sock.recv(4096)

    reply = names.container.call(send)
    assert reply[:2] == b"\x12\x34"
    assert reply[3] & 0xF == 1, "FORMERR"
    assert works(names)
    assert names.counters()["refused-malformed"] > 10


def test_a_spoofed_client_is_refused_and_counted(names):
    names.container.ip("addr", "add", "192.0.2.99/32", "dev", "eth0")
    names.node.ip("route", "add", "192.0.2.99/32", "dev", "edge-br0")
    said = names.container.command("dig", f"@{GATEWAYS[0]}", "-b", "192.0.2.99", "+tries=1", "+time=2", NAME)
    assert "status: REFUSED" in said
    assert names.counters()["refused-client"] == 1
    assert works(names)


def test_long_messages_and_idle_connections_are_bounded(names):
    before = names.memory()

    def connect() -> tuple[list[socket.socket], bytes]:
        sock = socket.create_connection((GATEWAYS[0], 53), 3)
        sock.sendall(b"\xff\xff" + bytes(65_535))
        reply = sock.recv(100)
        sock.close()
        return [socket.create_connection((GATEWAYS[0], 53), 3) for _ in range(1000)], reply

    idle, reply = names.container.call(connect)
    try:
        assert reply[5] & 0xF == 1, "FORMERR"
        counters = names.counters()
        assert counters["connections"] <= 64
        assert counters["refused-connection"] >= 900
        assert works(names)
        assert "10.30.0.30" in names.node.command("dig", "+tcp", "+short", f"@{GATEWAYS[0]}", NAME)
        assert names.memory() - before < 16 * MIB
    finally:
        for sock in idle:
            sock.close()


def test_upstream_down_fails_in_time_and_slows_no_local_name(names):
    began = time.monotonic()
    assert "status: SERVFAIL" in names.dig("example.org")
    assert 0.5 < time.monotonic() - began < 2.0

    def both() -> float:
        with udp() as sock:
            for number in range(200):
                sock.send(b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\3%03d\3org\0\0\1\0\1" % number)
        with udp() as sock:
            sock.settimeout(3)
            slowest = 0.0
            question = b"".join(bytes((len(it),)) + it.encode() for it in NAME.split("."))
            for _ in range(200):
                began = time.monotonic()
                sock.send(b"\0\2\1\0\0\1\0\0\0\0\0\0" + question + b"\0\0\1\0\1")
                assert sock.recv(512)[:2] == b"\0\2"
                slowest = max(slowest, time.monotonic() - began)
            return slowest

    assert names.container.call(both) < 0.25


def test_an_unknown_service_is_asked_for_once_and_answered_when_it_comes(names):
    def ask() -> list[bytes]:
        with udp() as sock:
            sock.settimeout(3)
            question = b"".join(bytes((len(it),)) + it.encode() for it in ["new", "test", "shop", "prod", "local"])
            for number in range(10):
                sock.send(bytes((0, number)) + b"\1\0\0\1\0\0\0\0\0\0" + question + b"\0\0\1\0\1")
            names.wait("need")
            names.say(put=[service(job="shop.prod.new.test", number=40)], gone=[])
            names.say(answer="shop.prod.new.test", verdict="found")
            return [sock.recv(512) for _ in range(10)]

    replies = names.container.call(ask)
    assert all(reply.endswith(bytes((10, 30, 0, 40))) for reply in replies)
    assert not [it for it in names.heard if "need" in it]


def test_an_answer_that_does_not_come_is_not_waited_for(names):
    began = time.monotonic()
    assert "status: SERVFAIL" in names.dig("slow.test.shop.prod.local")
    assert 1.9 < time.monotonic() - began < 2.6
