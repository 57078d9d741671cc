"""How ten thousand flows spread over ten instances: through a real worker, its TUN and the tables that it shares."""

import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.environment.netns import Netns
from tests.supervisor.pair import Pair
from tests.supervisor.sockets import PORT
from tests.supervisor.world import SETTLE_S, until

pytestmark = pytest.mark.root

JOB = "app.ns.many.test"
ROUND_ROBIN, HASHED = "10.30.42.1", "10.30.42.2"
TEN, FLOWS, FIRST_PORT = range(10), 10_000, 20_000
WEIGHTS = (1, 2, 3, 4, 5, 5, 4, 3, 2, 1)
BURST = 200
"""Packets at a time: less than what the TUN's queue and the worker's socket hold."""
_RECEIVE_BUFFER = 1 << 22
_SO_RCVBUFFORCE = 33


@dataclass
class Ten:
    """A service with ten instances on the first node; the client is on the second."""

    pair: Pair
    containers: list[Netns]
    stack: ExitStack
    servers: list[socket.socket] = field(init=False)
    client: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self.servers = [self._opened(it, socket.SOCK_DGRAM, 0) for it in self.containers]
        for server in self.servers:
            server.bind(("", PORT))
            server.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            server.setblocking(False)
        self.client = self._opened(self.pair.client, socket.SOCK_RAW, socket.IPPROTO_UDP)

    def _opened(self, container: Netns, kind: socket.SocketKind, protocol: int) -> socket.socket:
        return self.stack.enter_context(container.call(lambda: socket.socket(socket.AF_INET, kind, protocol)))

    def spread(self, address: str) -> dict[int, int]:
        """The instance that each of FLOWS flows reaches, by its port; every one does."""
        reached: dict[int, int] = {}
        for sent in range(0, FLOWS, BURST):
            for port in range(FIRST_PORT + sent, FIRST_PORT + sent + BURST):
                self.client.sendto(struct.pack("!5H", port, PORT, 10, 0, port), (address, 0))
            self._collect(reached, sent + BURST)
        return reached

    def _collect(self, reached: dict[int, int], expected: int) -> None:
        deadline = time.monotonic() + SETTLE_S
        while len(reached) < expected:
            assert time.monotonic() < deadline, f"{expected - len(reached)} of {expected} flows reach no instance"
            for number, server in enumerate(self.servers):
                reached |= dict.fromkeys(_received(server), number)

    def weigh(self, *weights: int) -> None:
        """Gives the instances these weights, and waits until the client's node knows."""
        told = {str(number): weight for number, weight in enumerate(weights) if weight != 1}
        self.pair.manager.deploy(JOB, len(TEN), service_ips=SERVICE_IPS, weights=told)
        until(lambda: sorted(self.behind(ROUND_ROBIN)) == sorted(weights), "the client's node knows the weights")

    def behind(self, address: str) -> list[int]:
        """The weights of the instances that the client's node has behind a ServiceIP."""
        found = [it for it in self.pair.two.api.services() if it["address"] == address]
        return list(found[0]["weights"]) if found else []


SERVICE_IPS: dict[str, dict[str, Any]] = {"rr": {"v4": ROUND_ROBIN}, "maglev": {"v4": HASHED, "hash_port": True}}


def _received(server: socket.socket) -> Iterator[int]:
    while True:
        try:
            yield int.from_bytes(server.recv(16), "big")
        except BlockingIOError:
            return


@contextmanager
def ten_instances(pair: Pair) -> Iterator[Ten]:
    """Attached and announced, each with a socket; the client's node knows them."""
    containers = [pair.world.container() for _ in TEN]
    pair.manager.deploy(JOB, len(TEN), service_ips=SERVICE_IPS)
    with ExitStack() as stack:
        stack.callback(_detach_all, pair)
        for number, container in zip(TEN, containers, strict=True):
            pair.one.api.attach(JOB, number, {"netns": container.name})
        until(lambda: {it["status"] for it in pair.manager.service(JOB)["instances"]} == {"up"}, "all are announced")
        made = Ten(pair, containers, stack)
        for address in (ROUND_ROBIN, HASHED):  # the client's node asks for what it does not know
            made.client.sendto(struct.pack("!5H", 1, PORT, 10, 0, 0), (address, 0))
        until(lambda: {len(made.behind(it)) for it in (ROUND_ROBIN, HASHED)} == {len(TEN)}, "all are known")
        until(lambda: [it for server in made.servers for it in _received(server)], "what waited has arrived")
        yield made


def _detach_all(pair: Pair) -> None:
    for it in pair.one.api.attachments():
        if it["service"] == JOB:
            pair.one.api.detach(JOB, it["instance"])


@pytest.fixture(scope="module")
def ten(pair: Pair) -> Iterator[Ten]:
    """See :class:`Ten`; weights are 1 unless a test is told otherwise."""
    with ten_instances(pair) as made:
        yield made


def test_round_robin_is_even_within_two_percent(ten: Ten) -> None:
    got = Counter(ten.spread(ROUND_ROBIN).values())
    assert all(abs(got[number] / FLOWS * len(TEN) - 1) <= 0.02 for number in TEN), got


def test_weights_are_kept_within_five_percent(ten: Ten) -> None:
    ten.weigh(*WEIGHTS)
    got = Counter(ten.spread(ROUND_ROBIN).values())
    ten.weigh(*([1] * len(TEN)))
    assert all(abs(got[it] / FLOWS * sum(WEIGHTS) / WEIGHTS[it] - 1) <= 0.05 for it in TEN), got


def test_maglev_moves_less_than_15_percent_when_one_of_ten_leaves(ten: Ten) -> None:
    """Whoever was at another instance stays there, but for the few that the table's slots cost."""
    before = ten.spread(HASHED)
    assert set(before.values()) == set(TEN)
    ten.pair.one.api.detach(JOB, 4)
    until(lambda: len(ten.behind(HASHED)) == len(TEN) - 1, "the client's node knows that one has left")
    after = ten.spread(HASHED)
    assert set(after.values()) == set(TEN) - {4}
    assert sum(before[port] != after[port] for port in before) < 0.15 * FLOWS
