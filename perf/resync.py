"""How long a node takes to catch up with its cluster over a real broker: the connection comes back, everything is asked
for again, and one service after the other changes.

A node's member with its tables, as the supervisor has them, against an embedded broker and a stand-in for the manager,
each a process. The manager answers each question from memory. 10,000 services of five instances, both families, each of
which the node follows. First all are asked for by name; then the connection is cut, and comes back: until no service is
stale any more, once with the answers of before, and once with one instance moved in each. Then a notice about one
service: until the new epoch is published, by way of a question and its answer.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from socket import SHUT_RDWR, socket
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import orjson
import paho.mqtt.client as mqtt
import uvloop
from paho.mqtt.enums import CallbackAPIVersion

from appliance.cluster import topics
from appliance.cluster.feed import Tables
from appliance.cluster.member import Member
from appliance.config import Config
from appliance.supervisor.publication import Publication
from appliance.supervisor.warm import compile_publisher
from appliance.tables.catalogue import Catalogue
from appliance.tables.publish import Publisher
from perf.study import Study, study
from perf.tables import CAPACITY, INSTANCES, NODE, OVERLAY, SERVICE_RANGES, SERVICES, answer, here, job
from tests.manager.processes import Cluster

UPDATES = 200
WAITED = 500
"""Questions that somebody waits for, at a time: a node refuses more than ``queries.WAITED_MAX``."""
POLL_S = 0.5
"""Between two looks at what is stale, which costs ten milliseconds."""
QUIET_S = 0.02
"""Between two changes: each is one of its own."""


@dataclass(frozen=True)
class Result:
    """Seconds; each pair is wall clock and CPU time of the node's process."""

    first: tuple[float, float]
    again: tuple[float, float]
    other: tuple[float, float]
    updates: list[float]

    def study(self) -> Study:
        """What was measured, in words."""
        half, most = np.percentile(self.updates, (50, 99)) * 1e3
        facts = {
            "services, instances, both families": f"{SERVICES:,}, {SERVICES * INSTANCES:,}",
            "all services asked for, the first time: seconds, of CPU": _pair(self.first),
            "the connection is cut and back, nothing is different: until nothing is stale, of CPU": _pair(self.again),
            "the connection is cut and back, one instance of each has moved: until nothing is stale, of CPU": _pair(
                self.other
            ),
            "one instance moves: from the manager's notice to the published epoch, median": f"{half:.1f} ms",
            "· 99 %": f"{most:.1f} ms",
        }
        return study("resync", __doc__ or "", facts)


def _pair(seconds: tuple[float, float]) -> str:
    return f"{seconds[0]:.1f} s, {seconds[1]:.1f} s"


def measure() -> Result:
    """All of it, once."""
    with TemporaryDirectory() as directory, ExitStack() as stack:
        cluster = Cluster(Path(directory), stack)
        cluster.broker()
        ours, theirs = Pipe()
        manager = Process(target=_manage, args=(cluster.mqtt, theirs))
        manager.start()
        stack.callback(manager.join)
        stack.callback(manager.terminate)
        ours.recv()
        return uvloop.run(_Node(cluster.mqtt, Path(directory) / "node", ours).measure())


def _manage(port: int, told: Connection) -> None:
    """Answers what it is asked, in a process of its own. Told a number, it moves an instance of that service and gives
    notice; told -1, one of every service, and is silent."""
    answers = [answer(number) for number in range(SERVICES)]
    numbers = {job(number): number for number in range(SERVICES)}
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="manager")

    def asked(_client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        name = orjson.loads(message.payload)["sname"]
        client.publish(topics.of_node(NODE, topics.QUERY_RESULT), answers[numbers[name]])

    client.on_message = asked
    client.connect("127.0.0.1", port)
    client.subscribe(topics.of_node(NODE, topics.QUERY), 1)
    client.loop_start()
    told.send("ready")
    while True:
        number = told.recv()
        if number < 0:
            answers[:] = [answer(it, moved=True) for it in range(SERVICES)]
        else:
            answers[number] = answer(number)
            client.publish(topics.updates(job(number)), b'{"type":"DEPLOYMENT"}', 1)
        told.send("done")


class _Node:
    """A member of the cluster with tables, in one event loop."""

    def __init__(self, port: int, state: Path, manager: Connection) -> None:
        self._manager = manager
        self._connection: int | None = None
        self._config = Config.model_validate(
            {
                "node": {"id": NODE},
                "cluster": {"url": "127.0.0.1", "port": port, "refresh": 3600, "interest": 3600},
                "network": {"overlay": OVERLAY, "services": SERVICE_RANGES},
                "paths": {"state": state},
            }
        )
        compile_publisher()
        self._publisher = Publisher(CAPACITY)
        self._publication = Publication(Catalogue(self._publisher), here(1))

    async def measure(self) -> Result:
        """All of it, once."""
        member = Member(self._config, ip_address("192.0.2.1"), 50103, self._publish)
        member.hold_connection(self._hold)
        await member.start()
        member.serve()
        await self._online()
        first = await self._timed(member, self._ask(member))
        again = await self._timed(member, self._reconnect())
        self._tell(-1)
        other = await self._timed(member, self._reconnect())
        updates = [await self._update(number * 7 % SERVICES) for number in range(UPDATES)]
        await member.stop()
        return Result(first, again, other, updates)

    def _publish(self, tables: Tables) -> None:
        self._publication.update(tables)

    async def _timed(self, member: Member, work: Coroutine[Any, Any, None]) -> tuple[float, float]:
        began, used = time.monotonic(), time.process_time()
        await work
        while member.status()["staleness"]:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        return time.monotonic() - began, time.process_time() - used

    async def _ask(self, member: Member) -> None:
        """Has every service asked for."""
        free = asyncio.Semaphore(WAITED)

        async def one(number: int) -> None:
            async with free:
                assert await member.need(job(number))

        await asyncio.gather(*map(one, range(SERVICES)))

    async def _update(self, number: int) -> float:
        """One instance moves back; seconds until that is in the tables."""
        before = self._publisher.epoch
        began = time.monotonic()
        self._tell(number)
        while self._publisher.epoch == before:  # noqa: ASYNC110
            await asyncio.sleep(0)
        took = time.monotonic() - began
        await asyncio.sleep(QUIET_S)
        return took

    def _tell(self, number: int) -> None:
        self._manager.send(number)
        self._manager.recv()

    def _hold(self, descriptor: int | None) -> None:
        self._connection = descriptor

    async def _online(self) -> None:
        while self._connection is None:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S / 50)

    async def _reconnect(self) -> None:
        """Cuts the connection, and waits for the next one."""
        cut, self._connection = self._connection, None
        assert cut is not None
        with socket(fileno=os.dup(cut)) as connection:
            connection.shutdown(SHUT_RDWR)
        await self._online()
