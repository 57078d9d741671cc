"""A node as existing clusters know it: an MQTT 3.1.1 client that publishes and subscribes with QoS 1."""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiomqtt

ANSWER_S = 5.0


@dataclass(frozen=True)
class Received:
    """A message as the client saw it."""

    topic: str
    payload: Any
    qos: int
    retain: bool


def placed(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The instances that packets can be sent to."""
    return [it for it in answer["instance_list"] if "host_ip" in it]


class Node:
    """One connection. `inbox` has all messages in the order of their arrival."""

    def __init__(self, name: str, client: aiomqtt.Client) -> None:
        self.name = name
        self.client = client
        self.inbox: asyncio.Queue[Received] = asyncio.Queue()
        self.unplugged = False
        self.reading = asyncio.create_task(self.read())

    async def read(self) -> None:
        """Fills the inbox until the connection ends."""
        async for it in self.client.messages:
            assert isinstance(it.payload, bytes)
            self.inbox.put_nowait(Received(str(it.topic), json.loads(it.payload or b"null"), it.qos, it.retain))

    async def say(self, kind: str, payload: object, retain: bool = False) -> None:
        """Publishes below the node's own topics; bytes as they are."""
        raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        await self.client.publish(f"nodes/{self.name}/net/{kind}", raw, qos=1, retain=retain)

    async def listen(self, job: str) -> None:
        """Follows the notices about a job."""
        await self.client.subscribe(f"jobs/{job}/updates_available", qos=1)

    async def hear(self, end: str, seconds: float = ANSWER_S) -> Received:
        """The next message on a topic with this end; others before it are dropped."""
        async with asyncio.timeout(seconds):
            while True:
                received = await self.inbox.get()
                if received.topic.endswith(end):
                    return received

    async def silence(self, seconds: float) -> list[Received]:
        """All that arrives within some seconds."""
        await asyncio.sleep(seconds)
        return [self.inbox.get_nowait() for _ in range(self.inbox.qsize())]

    async def subnet(self) -> dict[str, Any]:
        """The node's subnets."""
        await self.say("subnet", {"METHOD": "GET"})
        return dict((await self.hear("/net/subnetwork/result")).payload)

    async def query(self, *, name: str = "", address: str = "") -> dict[str, Any]:
        """The answer to a table query."""
        await self.say("tablequery/request", {"sname": name, "sip": address})
        return dict((await self.hear("/net/tablequery/result")).payload)

    async def until(self, job: str, instances: int) -> dict[str, Any]:
        """The answer to a query by name as soon as so many instances have a place."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                answer = await self.query(name=job)
                if len(placed(answer)) == instances:
                    return answer
                await asyncio.sleep(0.02)

    async def numbers(self, job: str) -> list[int]:
        """The instances that have a place in the answer to a query by name."""
        return [it["instance_number"] for it in placed(await self.query(name=job))]

    async def deployed(self, job: str, number: int, v4: str, v6: str = "", host: str = "192.0.2.1") -> None:
        """Announces an instance, as an existing node does."""
        placed = {"nsip": v4, "nsipv6": v6, "host_port": "50103", "host_ip": host}
        await self.say("service/deployed", {"appname": job, "status": "DEPLOYED", "instance_number": number, **placed})

    async def unplug(self) -> None:
        """Ends the connection without a farewell."""
        connection = self.client._client.socket()
        assert isinstance(connection, socket.socket)
        self.unplugged = True
        connection.shutdown(socket.SHUT_RDWR)
        await asyncio.wait([self.reading])

    async def cut_off(self) -> None:
        """Waits until the broker has ended the connection."""
        self.unplugged = True
        await asyncio.wait([self.reading])


@asynccontextmanager
async def connect(
    port: int, name: str, *, will: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Node]:
    """A connected node, subscribed to its results. With a will it says that it is there."""
    last = aiomqtt.Will(f"nodes/{name}/net/status", b'{"status":"offline"}', qos=1, retain=True) if will else None
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
    client = aiomqtt.Client(
        "127.0.0.1", port, identifier=name, keepalive=30, will=last, socket_options=options, tls_context=tls
    )
    node = None
    try:
        async with client:
            client.pending_calls_threshold = 10_000
            node = Node(name, client)
            await client.subscribe(f"nodes/{name}/net/subnetwork/result", qos=1)
            await client.subscribe(f"nodes/{name}/net/tablequery/result", qos=1)
            if will:
                await node.say("status", {"status": "online"}, retain=True)
            yield node
    except aiomqtt.MqttError:
        if node is None or not node.unplugged:
            raise
    finally:
        if node is not None:
            node.reading.cancel()
            await asyncio.gather(node.reading, return_exceptions=True)
