"""Sends messages to nodes: an MQTT client, because only MQTT delivers with QoS 1.

A message that a NATS client publishes reaches MQTT subscribers with QoS 0 whatever they asked for, so answers go
through the broker's MQTT side. `send` returns when the broker has acknowledged all; while the broker is away it waits
and sends again, for at most PATIENCE_S.

At most WINDOW messages are on their way to the broker; others wait for their turn, in order, before their time begins
to run. Without that, a burst that takes the broker longer than ACK_S is sent again while it still works on it, which
makes it slower yet: 10,000 announcements of 5,000 nodes at once never ended.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn
from uuid import uuid4

import aiomqtt
import orjson

from appliance.cluster.connection import Connection
from appliance.cluster.manager.decide import Message
from appliance.cluster.manager.store import UnavailableError

log = logging.getLogger(__name__)

ACK_S = 2.0
"""How long the broker may take to acknowledge one message."""
PATIENCE_S = 8.0
"""How long a message is tried, from its turn on."""
WINDOW = 256
"""Messages sent and not acknowledged: a broker that acknowledges 128 a second keeps up with ACK_S."""
RECONNECT_S = 0.2
"""Pause between attempts to connect."""
KEEPALIVE_S = 15
"""Seconds between signs of life."""


class Outbox:
    """One connection to the broker's MQTT listener."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._host = host
        self._port = port
        self._client: Connection | None = None
        self._connected = asyncio.Event()
        self._window = asyncio.Semaphore(WINDOW)
        self._topic = ""
        self._begun: Callable[[], None] = lambda: None
        self._heard: Callable[[str, bytes], None] = lambda _topic, _payload: None

    @property
    def is_connected(self) -> bool:
        """Whether messages can be sent now."""
        return self._connected.is_set()

    def follow(self, topic: str, begun: Callable[[], None], heard: Callable[[str, bytes], None]) -> None:
        """Subscribes to a topic on each connection: ``begun`` is called before its first message. Before ``run``."""
        self._topic, self._begun, self._heard = topic, begun, heard

    async def connected(self) -> None:
        """Waits for the connection."""
        await self._connected.wait()

    async def run(self) -> NoReturn:
        """Keeps the connection for ever."""
        while True:
            try:
                async with self._new() as client:
                    self._client = client
                    self._begun()
                    if self._topic:
                        await client.subscribe(self._topic, qos=1)
                    self._connected.set()
                    async for message in client.messages:
                        self._heard(message.topic.value, message.payload if isinstance(message.payload, bytes) else b"")
            except aiomqtt.MqttError as error:
                log.warning("not connected", extra={"host": self._host, "port": self._port, "error": error})
            finally:
                self._connected.clear()
            await asyncio.sleep(RECONNECT_S)

    def _new(self) -> Connection:
        client = Connection(
            self._host,
            self._port,
            identifier=f"manager-{uuid4().hex}",
            keepalive=KEEPALIVE_S,
            timeout=ACK_S,
            tls_context=self._tls,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],  # else an answer waits 40 ms for an ACK
        )
        client.pending_calls_threshold = sys.maxsize  # many at once are what is meant here, and no reason for warnings
        return client

    async def send(self, messages: Iterable[Message]) -> None:
        """Delivers messages to the broker. Raises UnavailableError."""
        await asyncio.gather(*(self._send(message) for message in messages))

    async def _send(self, message: Message) -> None:
        payload = message.payload if isinstance(message.payload, bytes) else orjson.dumps(message.payload)
        async with self._window:
            end = time.monotonic() + PATIENCE_S
            while time.monotonic() < end:
                if await self._try(message, payload, end - time.monotonic()):
                    return
                await asyncio.sleep(RECONNECT_S)
        raise UnavailableError(f"{message.topic}: expected an acknowledgement within {PATIENCE_S:g} s")

    async def _try(self, message: Message, payload: bytes, left: float) -> bool:
        try:
            async with asyncio.timeout(left):
                await self._connected.wait()
            assert self._client is not None
            await self._client.publish(message.topic, payload, qos=1, retain=message.retain, timeout=ACK_S)
        except (aiomqtt.MqttError, TimeoutError):
            return False
        return True
