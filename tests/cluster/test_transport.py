"""The connection, with brokers that misbehave; those that behave are in the tests of the member."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from appliance.cluster import transport
from appliance.cluster.access import access
from appliance.cluster.commands import Publish, Subscribe
from appliance.cluster.connection import Connection
from appliance.cluster.transport import PAUSE_FIRST, PAUSE_LONGEST, TOPICS_A_CALL, Transport, pause
from appliance.config import Cluster
from tests.cluster import wire
from tests.cluster.member import run
from tests.cluster.mosquitto import free_port

CONNACK = b"\x20\x02\x00\x00"
WILL = Publish(wire.topic("status"), b"{}", retain=True)
Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Events:
    """What the transport reported, and a first command on each connection."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, object]] = []
        self.changed = asyncio.Event()
        self.first: Publish | Subscribe | None = None
        self.transport: Transport | None = None

    def _report(self, kind: str, what: object = None) -> None:
        self.reports.append((kind, what))
        self.changed.set()

    def connected(self) -> None:
        self._report("connected")
        if self.transport is not None and self.first is not None:
            self.transport.send(self.first)

    def disconnected(self, reason: str) -> None:
        self._report("disconnected", reason)

    def received(self, topic: str, payload: bytes) -> None:
        self._report("received", (topic, payload))

    def delivered(self, publish: Publish) -> None:
        self._report("delivered", publish)

    def refused(self, topic: str) -> None:
        self._report("refused", topic)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.reports]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()


@asynccontextmanager
async def connecting(*ports: int, first: Publish | Subscribe | None = None) -> AsyncIterator[Events]:
    """A transport to ports of the loopback, at work."""
    events = Events()
    reached = access(Cluster(url=",".join(f"mqtt://127.0.0.1:{port}" for port in ports)))
    events.transport, events.first = Transport(wire.NODE, reached, WILL, events), first
    task = asyncio.create_task(events.transport.run())
    try:
        yield events
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def broker(conversation: Conversation) -> AsyncIterator[int]:
    """Something that accepts connections, says what it says, and closes them; gives its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await conversation(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def read_packet(reader: asyncio.StreamReader) -> bytes:
    """One MQTT packet of less than 16 KiB."""
    kind, length = await reader.readexactly(2)
    if length & 0x80:
        length = (length & 0x7F) | (await reader.readexactly(1))[0] << 7
    return bytes([kind]) + await reader.readexactly(length)


def listening(heard: asyncio.Queue[bytes]) -> Conversation:
    """A broker that lets a node in, and then only listens."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_packet(reader)
        writer.write(CONNACK)
        while True:
            heard.put_nowait(await read_packet(reader))

    return listen


def test_pauses_double_up_to_a_bound_and_vary() -> None:
    assert [pause(attempt, lambda: 1.0) for attempt in range(5)] == [0.25, 0.5, 1.0, 2.0, 2.0]
    assert [pause(attempt, lambda: 0.0) for attempt in range(3)] == [0.125, 0.25, 0.5]
    assert pause(10**9, lambda: 1.0) == PAUSE_LONGEST


def test_a_broker_that_nobody_runs_is_tried_again_with_growing_pauses() -> None:
    async def test() -> None:
        async with connecting(free_port()) as events:
            times: list[float] = []
            for count in range(1, 5):
                await events.until(lambda: len(events.reports) >= count)  # noqa: B023
                times.append(time.monotonic())
        assert set(events.kinds()) == {"disconnected"}
        pauses = [after - before for before, after in pairwise(times)]
        assert pauses[0] >= PAUSE_FIRST / 2
        assert pauses[2] > pauses[0]

    run(test)


def test_of_several_brokers_the_next_one_is_tried_when_one_fails_or_is_lost() -> None:
    async def test() -> None:
        heard: asyncio.Queue[bytes] = asyncio.Queue()
        leave = asyncio.Event()

        async def go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_packet(reader)
            writer.write(CONNACK)
            await leave.wait()

        async with (
            broker(go) as goes,
            broker(listening(heard)) as stays,
            connecting(free_port(), goes, stays) as events,
        ):
            assert events.transport is not None
            await events.until(lambda: events.kinds().count("connected") == 1)
            assert events.transport.broker == f"mqtt://127.0.0.1:{goes}"
            leave.set()
            await events.until(lambda: events.kinds().count("connected") == 2)
            assert events.transport.broker == f"mqtt://127.0.0.1:{stays}"
        assert events.kinds() == ["disconnected", "connected", "disconnected", "connected"]

    run(test)


def test_a_broker_that_takes_and_drops_is_not_stormed() -> None:
    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_packet(reader)
        writer.write(CONNACK)
        await writer.drain()

    async def test() -> None:
        async with broker(drop) as port, connecting(port) as events:
            await asyncio.sleep(1.2)  # without pauses that would be hundreds of connections
        assert 2 <= events.kinds().count("disconnected") <= 5, "noticed each time, and not stormed"

    run(test)


def test_a_call_that_is_not_acknowledged_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ACK_TIMEOUT", 0.2)

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_packet(reader)
        writer.write(CONNACK)
        await reader.read()

    async def test() -> None:
        async with broker(mute) as port, connecting(port, first=WILL) as events:
            await events.until(lambda: events.kinds().count("connected") == 2)
            assert "delivered" not in events.kinds()
            assert ("disconnected", "Operation timed out") in events.reports

    run(test)


def test_a_broker_that_closes_before_it_lets_a_node_in_is_tried_again_at_once() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_packet(reader)

    async def test() -> None:
        async with broker(close) as port, connecting(port) as events, asyncio.timeout(transport.ACK_TIMEOUT / 2):
            await events.until(lambda: len(events.reports) == 2)
        why = "the broker closed the connection before it let this node in"
        assert events.reports == [("disconnected", why)] * 2

    run(test)


@pytest.mark.parametrize("answer", [b"", CONNACK], ids=["an attempt", "a connection"])
def test_what_has_lost_its_own_address_is_given_up_at_once(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a farewell, which would not arrive; and nothing of it is left that an answer could still wake."""
    ends: asyncio.Queue[bytes] = asyncio.Queue()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_packet(reader)
        writer.write(answer)
        ends.put_nowait(await reader.read())

    async def test() -> None:
        async with broker(mute) as port, connecting(port) as events, asyncio.timeout(transport.ACK_TIMEOUT / 2):
            assert events.transport is not None
            assert not events.transport.renew_if_stranded()
            monkeypatch.setattr(Connection, "is_stranded", lambda self: self.socket is not None)
            while not events.transport.renew_if_stranded():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert await ends.get() == b""
            await events.until(lambda: "disconnected" in events.kinds())
            assert ("disconnected", "this node has lost the address that it was connected from") in events.reports

    run(test)


def test_what_is_said_without_a_connection_is_not_said_later() -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def test() -> None:
        events = Events()
        async with broker(listening(heard)) as port:
            other = Transport(wire.NODE, access(Cluster(url=f"mqtt://127.0.0.1:{port}")), WILL, events)
            other.send(Publish("too/early", b"{}"))
            task = asyncio.create_task(other.run())
            await events.until(lambda: events.kinds() == ["connected"])
            other.send(Publish("in/time", b"{}"))
            first = await heard.get()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert b"in/time" in first

    run(test)


def test_many_topics_are_subscribed_to_in_packets_that_any_broker_takes() -> None:
    topics = tuple(f"jobs/app.ns.s{number}.test/updates_available" for number in range(2 * TOPICS_A_CALL + 1))
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def test() -> None:
        async with broker(listening(heard)) as port, connecting(port, first=Subscribe(topics)):
            counts = [(await heard.get()).count(b"updates_available") for _ in range(3)]
        assert counts == [TOPICS_A_CALL, TOPICS_A_CALL, 1]

    run(test)
