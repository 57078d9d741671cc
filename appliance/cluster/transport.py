"""The connection to the broker: carries out what the session says about topics, and reports what arrives.

Theory of operation
-------------------
*Owns* one MQTT client at a time, and the calls under way on it. *Used* by the member, in its event loop; ``events``
is called there, never concurrently.

``run`` connects, reports, reads until the connection is lost, and begins again after a pause that doubles from
``PAUSE_FIRST`` to ``PAUSE_LONGEST`` seconds, varied so that nodes do not return in step. A connection that lasted
``LASTED`` seconds makes the next pause the first again; a broker that takes a node and drops it at once does not get
one attempt after another. Of several brokers the next attempt is at the next one, after one that failed and after a
connection that was lost.

Calls are begun in the order of ``send`` and not waited for one by one: at most ``CALLS_MAX`` are under way, so
the distance to the broker does not bound how many answers a second a node can ask for. A call that the broker does not
acknowledge within ``ACK_TIMEOUT`` seconds means that state there and here may differ: the connection is given up, and
the next one reconciles. What was sent and not acknowledged is not sent again by itself, as the session says what is
true at the time of the next connection.

A connection does not outlive the address that it was made from: nothing would arrive any more, and TCP would take
``SILENCE_MAX`` to say so. Whoever sees addresses go asks for it to be looked at (``renew_if_stranded``), be it made
or only begun. The next attempt follows as after a long connection, for that was nobody's refusal.

The broker publishes the last will when the connection ends without a farewell, within 1.5 times the keepalive at the
latest. So that a node that is merely busy is not given up, the broker is asked for a sign of life after ``ASK`` of
the keepalive, not after all of it: a pause of the event loop may then be as long as the rest.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol

import aiomqtt

from appliance.cluster.access import Access
from appliance.cluster.commands import Publish, Subscribe, Transmission, Unsubscribe
from appliance.cluster.connection import Connection
from appliance.tasks import end

log = logging.getLogger(__name__)
mqtt_log = log.getChild("mqtt")
mqtt_log.setLevel(logging.ERROR)  # what it warns of reaches us as exceptions too

PAUSE_FIRST: Final = 0.25
PAUSE_LONGEST: Final = 2.0
"""Seconds. A broker that returns is found soon enough for changes to be in force within 5 s."""
LASTED: Final = 10.0
ASK: Final = 0.5
"""Share of the keepalive, which paho looks at once a second."""
ACK_TIMEOUT: Final = 10.0
CALLS_MAX: Final = 256
"""Enough for 5,000 calls a second over a distance of 50 ms."""
TOPICS_A_CALL: Final = 256
"""Topics of one subscription: about 20 KB, less than any broker's limit of a packet."""
SILENCE_MAX: Final = 10_000
"""Milliseconds for which data may stay without the peer's kernel acknowledging it (tcp(7), TCP_USER_TIMEOUT)."""
REFUSED: Final = 0x80
"""Return codes of a subscription from here on are refusals (MQTT 3.1.1 section 3.9.3)."""
QOS: Final = 1
"""Of what this node publishes: the broker says when it has it."""
SUBSCRIBED_QOS: Final = 0
"""Of what it hears. Within a connection TCP loses nothing, and beyond it a clean session keeps nothing. So to
acknowledge each message protects from nothing, and costs nats-server a consumer for each topic of each node, all of
which it looks at for each acknowledgement (`docs/cluster.md`)."""
REPLACED_S: Final = 0.3
"""How long the first connection of a process says nothing, if its identifier is made of a secret: the process before
may have had another secret, and so another identifier, and the broker is to hear the end of its connection, with the
last will, before it hears of us."""
LOST: Final = (aiomqtt.MqttError, OSError, ValueError)
"""How a connection ends, or fails to begin; ValueError is paho's, about a host name that is none."""


class StrandedError(aiomqtt.MqttError):
    """The host has lost the address that a connection was made from."""


class Events(Protocol):
    """Who is told."""

    def connected(self) -> None:
        """A new connection is there."""

    def disconnected(self, reason: str) -> None:
        """The connection is lost, or an attempt failed."""

    def received(self, topic: str, payload: bytes) -> None:
        """A message arrived."""

    def delivered(self, publish: Publish) -> None:
        """The broker acknowledged a message."""

    def refused(self, topic: str) -> None:
        """The broker does not let this node subscribe to a topic."""


def pause(attempt: int, chance: Callable[[], float] = random.random) -> float:
    """Seconds before an attempt, counted from 0: between half and the whole of a time that doubles."""
    longest = min(PAUSE_LONGEST, PAUSE_FIRST * 2 ** min(attempt, 16))
    return float(longest * (0.5 + 0.5 * chance()))


class Transport:
    """See the module. ``will`` is published by the broker when this node is lost."""

    def __init__(self, node: str, access: Access, will: Publish, events: Events) -> None:
        self._node = node
        self._access = access
        self._will = will
        self._events = events
        self._turn = 0
        self.hold: Callable[[int | None], None] = lambda _descriptor: None
        """Is given the descriptor of each connection, and None at its end. Whoever keeps a duplicate keeps the broker
        from publishing the last will if this process is killed; the next connection of this node replaces it."""
        self._client: Connection | None = None
        self._broken: asyncio.Future[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._is_first = bool(access.mark)

    async def run(self) -> None:
        """Keeps a connection until cancelled."""
        attempt, loop = 0, asyncio.get_running_loop()
        while True:
            began, refused = loop.time(), True
            try:
                await self._connection()
            except Exception as error:  # also a mistake of ours: a new connection starts from the state
                if not isinstance(error, LOST):
                    log.exception("connection given up")
                self._events.disconnected(str(error) or type(error).__name__)
                refused = not isinstance(error, StrandedError)
                self._turn += refused
            attempt = attempt + 1 if refused and loop.time() - began < LASTED else 0
            await asyncio.sleep(pause(attempt))

    @property
    def broker(self) -> str:
        """The broker of this connection or attempt, as an URL."""
        return self._access.url(self._turn)

    def send(self, command: Transmission) -> None:
        """Begins to carry out a command. Without a connection it is dropped: the next one starts from the state."""
        if self._client is None or self._broken is None:
            return
        for part in _parts(command):
            call = asyncio.create_task(self._call(self._client, self._broken, part))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def flush(self, seconds: float) -> None:
        """Waits until what was sent is acknowledged, at most so long."""
        if self._calls:
            await asyncio.wait(set(self._calls), timeout=seconds)

    def renew_if_stranded(self) -> bool:
        """Gives up a connection whose own address this host has no more, for a new one; whether it was such."""
        if self._client is None or not self._client.is_stranded():
            return False
        reason = StrandedError("this node has lost the address that it was connected from")
        if self._broken is None:
            self._client.give_up(reason)
        elif not self._broken.done():
            self._broken.set_exception(reason)
        self._client.abandon()
        return True

    async def _connection(self) -> None:
        """One connection, from its begin to its end. Raises MqttError when it is lost."""
        self._client = client = self._new_client()
        try:
            async with client:
                client.pending_calls_threshold = CALLS_MAX
                client.ask_after(max(1, round(self._access.keepalive * ASK)))
                await self._use(client)
        finally:
            self._client = None

    async def _use(self, client: Connection) -> None:
        """A connection that is made, to its end."""
        self._broken = broken = asyncio.get_running_loop().create_future()
        try:
            self.hold(client.socket.fileno())
            if self._is_first:
                await asyncio.sleep(REPLACED_S)
                self._is_first = False
            self._events.connected()
            await self._read(client, broken)
        finally:
            self._broken = None
            self.hold(None)
            await end(self._calls)

    async def _read(self, client: Connection, broken: asyncio.Future[None]) -> None:
        """Reports messages until the connection is lost, or a call says that it is of no use any more."""
        reading = asyncio.create_task(self._report(client))
        try:
            await asyncio.wait({reading, broken}, return_when=asyncio.FIRST_COMPLETED)
            await (broken if broken.done() else reading)
        finally:
            broken.cancel()
            await end({reading})

    async def _report(self, client: Connection) -> None:
        async for message in client.messages:
            payload = message.payload
            client.acknowledge()
            self._events.received(message.topic.value, payload if isinstance(payload, bytes) else b"")

    async def _call(self, client: Connection, broken: asyncio.Future[None], command: Transmission) -> None:
        try:
            await self._carry_out(client, command)
        except aiomqtt.MqttError as error:
            if not broken.done():
                broken.set_exception(error)

    async def _carry_out(self, client: Connection, command: Transmission) -> None:
        match command:
            case Publish():
                await client.publish(command.topic, command.payload, QOS, command.retain)
                client.acknowledge()
                self._events.delivered(command)
            case Subscribe():
                await self._subscribe(client, command.topics)
            case Unsubscribe():
                await client.unsubscribe(list(command.topics))

    async def _subscribe(self, client: Connection, topics: tuple[str, ...]) -> None:
        codes: Iterable[Any] = await client.subscribe([(topic, SUBSCRIBED_QOS) for topic in topics])
        for topic, code in zip(topics, codes, strict=False):
            if getattr(code, "value", code) >= REFUSED:
                self._events.refused(topic)

    def _new_client(self) -> Connection:
        return Connection(
            *self._access.broker(self._turn),
            username=self._access.user,
            password=self._access.password,
            logger=mqtt_log,
            identifier=self._access.identifier(self._node),
            protocol=aiomqtt.ProtocolVersion.V311,
            will=aiomqtt.Will(self._will.topic, self._will.payload, QOS, self._will.retain),
            clean_session=True,
            timeout=ACK_TIMEOUT,
            keepalive=self._access.keepalive,
            max_inflight_messages=CALLS_MAX,
            max_concurrent_outgoing_calls=CALLS_MAX,
            tls_context=self._access.tls,
            socket_options=[
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MAX),
            ],
        )


def _parts(command: Transmission) -> Iterator[Transmission]:
    """A command as calls of bounded size, which can all be begun at once."""
    if not isinstance(command, Subscribe):
        yield command
        return
    for start in range(0, len(command.topics), TOPICS_A_CALL):
        yield Subscribe(command.topics[start : start + TOPICS_A_CALL])
