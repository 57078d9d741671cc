"""An existing cluster service manager as far as a node sees it, over a real broker.

It does what was seen on the wire of the real one, among that: it subscribes to everything of all nodes, and ends at the
first message that is not JSON, or that removes an interest that it does not have.
"""

import asyncio
import json
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiomqtt

from appliance.tasks import end
from tests.cluster import wire

NO_DELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Manager:
    """``jobs``: the instances of each. ``heard``: the kind and payload of every message."""

    def __init__(self, client: aiomqtt.Client) -> None:
        self.jobs: dict[str, list[dict[str, Any]]] = {}
        self.heard: list[tuple[str, Any]] = []
        self.answers = True
        self._client = client
        self._interested: dict[str, set[str]] = defaultdict(lambda: {"another node"})
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Answers until cancelled."""
        async for message in self._client.messages:
            _, node, _, kind = message.topic.value.split("/", 3)
            if kind.endswith("/result"):
                continue
            assert isinstance(message.payload, bytes)
            payload = json.loads(message.payload)
            self.heard.append((kind, payload))
            await self._react(node, kind, payload)
            self._news.set()

    async def _react(self, node: str, kind: str, payload: Any) -> None:
        if kind == "interest/remove":
            self._interested[payload["appname"]].remove(node)
        elif kind == "subnet" and self.answers:
            await self.say(node, "subnetwork/result", b'{"address":"10.18.0.64","addressv6":"fc00::100"}')
        elif kind == "tablequery/request" and self.answers:
            await self._answer(node, payload["sname"], payload["sip"])

    async def _answer(self, node: str, name: str, address: str) -> None:
        job = name or next((job for job, them in self.jobs.items() if any(address in str(it) for it in them)), "")
        if job:
            self._interested[job].add(node)
        await self.say(node, "tablequery/result", wire.answer(*self.jobs.get(job, ()), job=job, key=name or address))

    async def say(self, node: str, kind: str, payload: bytes) -> None:
        """Tells a node something."""
        await self._client.publish(f"nodes/{node}/net/{kind}", payload, qos=1)

    async def notify(self, job: str) -> None:
        """Tells everybody that something about a job is new."""
        await self._client.publish(f"jobs/{job}/updates_available", b'{"type":"DEPLOYMENT"}', qos=1)

    def said(self, kind: str) -> list[Any]:
        """What was heard of one kind."""
        return [payload for heard, payload in self.heard if heard == kind]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until something that it hears makes a condition true."""
        while not condition():
            self._news.clear()
            await self._news.wait()


@asynccontextmanager
async def manager(port: int) -> AsyncIterator[Manager]:
    """A running manager. What goes wrong in it fails the test."""
    async with aiomqtt.Client("127.0.0.1", port, socket_options=[NO_DELAY]) as client:
        client.pending_calls_threshold = 1000
        await client.subscribe("nodes/+/net/#", qos=1)
        running = Manager(client)
        task = asyncio.create_task(running.run())
        try:
            yield running
        finally:
            failed = task.done() and task.exception()
            await end({task})
        assert not failed, f"the manager is deaf: {failed!r}"
