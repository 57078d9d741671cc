"""The prober over real sockets: another node's answer, delayed by a forwarder in between."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import cast

from appliance.dataplane.probe import ANSWER, REQUEST
from appliance.supervisor.prober import Prober
from appliance.supervisor.rtt import Node
from appliance.tables.catalogue import Host, Service

S = ip_address("10.30.30.30")
FAR = [ip_address("10.18.0.66"), ip_address("10.18.0.130")]


class Peer(asyncio.DatagramProtocol):
    """A node behind a line with a delay; it answers as a worker does."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # asyncio's own is none by its type

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert data.startswith(REQUEST)
        assert self._transport is not None
        asyncio.get_running_loop().call_later(self.delay, self._transport.sendto, ANSWER + data[8:], addr)


@contextmanager
def bound() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield sock


async def until(order: list[Node], prober: Prober, wanted: Node, seconds: float) -> float:
    """Seconds until the node with this endpoint is near."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while order[0] != wanted:
        assert loop.time() - began < seconds, prober.times()
        await asyncio.sleep(0.05)
    return loop.time() - began


async def follow(first: socket.socket, second: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    near, far = Peer(0.005), Peer(0.040)
    nodes: list[Node] = [(ip_address("127.0.0.1"), it.getsockname()[1]) for it in (first, second)]
    transports = [
        (await loop.create_datagram_endpoint(lambda it=it: it, sock=sock))[0]  # type: ignore[misc]
        for it, sock in ((near, first), (far, second))
    ]
    hosts = {address: Host(address, *node) for address, node in zip(FAR, nodes, strict=True)}
    service = Service(S, "closest", tuple(FAR))
    order: list[Node] = []
    changes: list[float] = []

    def arrange() -> None:
        (got,) = prober.arrange(hosts.get, [service])
        order[:] = [(hosts[it].node, hosts[it].port) for it in got.backends]
        changes.append(loop.time())

    prober = Prober(arrange)
    await prober.start()
    arrange()
    try:
        await until(order, prober, nodes[0], 10)
        await asyncio.sleep(3)
        before = len(changes)
        near.delay, far.delay = 0.080, 0.010
        assert await until(order, prober, nodes[1], 10) < 10
        await asyncio.sleep(3)
        assert len(changes) == before + 1
    finally:
        prober.close()
        for transport in transports:
            transport.close()


def test_a_change_of_delay_is_followed_within_ten_seconds_and_once() -> None:
    with bound() as first, bound() as second:
        asyncio.run(follow(first, second))
