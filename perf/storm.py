"""Thousands of simulated nodes against one cluster service manager: how fast it takes them, and how fast it tells them.

Real manager, real broker, over loopback. Each node is an MQTT connection of its own, with a last will and the
subscriptions that existing nodes make, as both cost the broker something; but no client library a node
(`perf.load.mqtt`): all of them live in this one process under uvloop, which competes with what it measures for the
CPUs. What each of the three processes used of a CPU is among the facts, so that one sees whose limit a number is.
Phases, one after the other:

1. nodes      connect, subscribe, say that they are there, and get their subnets
2. services   are deployed over the REST interface, with one instance each
3. instances  are announced by their nodes
4. followers  all nodes ask for one service, and subscribe to its notices
5. notices    that service changes CHANGES times; each node notes when it heard, asks at once, as nodes do, and notes
              when it had the answer
6. join       one more manager starts, and has read all that is stored when it is ready

A phase ends after PHASE_S seconds, done or not: the number that it reached is the result then, and what follows goes
on with that. So the study also tells where it breaks. A piece of work that fails is counted by the error's name."""

from __future__ import annotations

import asyncio
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
import orjson
import uvloop

from perf import brokers, meter
from perf.load import mqtt
from perf.study import Study, study
from tests.manager.processes import READY_S, Cluster, Manager, cluster

PHASE_S: Final = 120.0
SETTLE_S: Final = 60.0
"""Seconds in which the manager may work off what the broker has taken for it."""
AT_ONCE: Final = 32
"""Requests of one kind under way: a manager is asked by many, and not by all at the same moment."""
CHANGES: Final = 3
NOTICE_S: Final = 20.0
FOLLOWED: Final = "storm.perf.followed.test"
OPTIONS: Final = ("--services-v4", "10.128.0.0/9", "--subnets-v4", "10.64.0.0/10")
"""Ranges that hold as many: the usual ones end at 4,096 nodes and 65,536 addresses."""
FIRST: Final = 2
"""Host number of a node's first instance: after its subnet's own address and the gateway."""
ANNOUNCED: Final = "instances announced"
LAST: Final = 50
"""Of the instances that a subnet of the usual size holds beside those of this study."""
SUBNETS: Final = "subnetwork/result"
ANSWERS: Final = "tablequery/result"
NOTICE: Final = "updates_available"
ANSWER_S: Final = 30.0
"""Seconds that a simulated node waits for an answer; a real one asks again sooner, which is more load, not less."""


@dataclass(frozen=True)
class Phase:
    """How many of how many were done in so many seconds, how long one took, and what the others failed by."""

    what: str
    wanted: int
    done: int
    seconds: float
    times: list[float]
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def facts(self) -> dict[str, str]:
        """In words."""
        reached = (
            f"{self.done:,}" if self.done == self.wanted else f"{self.done:,} of {self.wanted:,} in the time given"
        )
        facts = {self.what: reached, f"· {self.what} a second": f"{self.done / self.seconds:,.0f}"}
        if self.times:
            p50, p99 = np.percentile(self.times, (50, 99)) * 1e3
            facts[f"· {self.what}, time of one, {AT_ONCE} at once: median, 99 %"] = f"{p50:.1f} ms, {p99:.1f} ms"
        if self.errors:
            facts[f"· {self.what}, failed"] = ", ".join(f"{count:,} {name}" for name, count in self.errors.items())
        return facts


async def phase(what: str, work: list[Callable[[], Awaitable[object]]]) -> Phase:
    """Does pieces of work, AT_ONCE at a time, until all are done or the time is over. A piece that fails is not
    done."""
    began, times, pieces, errors = time.monotonic(), list[float](), iter(work), Counter[str]()

    async def worker() -> None:
        for piece in pieces:
            left = began + PHASE_S - time.monotonic()
            if left <= 0:
                return
            at = time.monotonic()
            try:
                async with asyncio.timeout(left):
                    await piece()
            except (TimeoutError, OSError, AssertionError, aiohttp.ClientError) as error:
                errors[type(error).__name__] += 1
                continue
            times.append(time.monotonic() - at)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return Phase(what, len(work), len(times), time.monotonic() - began, times, errors)


def job(number: int) -> str:
    """A service's name."""
    return f"storm.perf.s{number}.test"


class Node:
    """A node: its connection, and whoever waits for the next message of a kind."""

    def __init__(self, number: int, qos: int) -> None:
        self.name, self._qos = f"{number:024x}", qos
        self.subnet = IPv4Address(0)
        self._session: mqtt.Session | None = None
        self._waiting: dict[str, asyncio.Future[bytes]] = {}

    def _heard(self, topic: str, payload: bytes) -> None:
        future = self._waiting.pop(topic.rpartition("/net/")[2] if "/net/" in topic else NOTICE, None)
        if future is not None and not future.done():
            future.set_result(payload)

    def next(self, kind: str) -> asyncio.Future[bytes]:
        """The next message of a kind."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[kind] = future
        return future

    async def connect(self, port: int) -> None:
        """Connects as existing nodes do, and gets its subnet. Raises OSError, TimeoutError."""
        at = f"nodes/{self.name}/net"
        will = f"{at}/status", b'{"status":"offline"}'
        self._session = await mqtt.session("127.0.0.1", port, self.name, self._heard, will)
        await self._session.subscribe(f"{at}/{SUBNETS}", f"{at}/{ANSWERS}", qos=self._qos)
        await self._session.publish(f"{at}/status", b'{"status":"online"}', retain=True)
        answer = orjson.loads(await self.ask("subnet", {"METHOD": "GET"}, SUBNETS))
        self.subnet = IPv4Address(answer["address"].partition("/")[0])

    async def say(self, kind: str, payload: dict[str, Any]) -> None:
        """Publishes; the broker has it when this returns. Raises OSError, TimeoutError."""
        assert self._session is not None
        await self._session.publish(f"nodes/{self.name}/net/{kind}", orjson.dumps(payload))

    async def ask(self, kind: str, payload: dict[str, Any], answer: str, patience: float = ANSWER_S) -> bytes:
        """Publishes, and waits for the answer for so many seconds. Raises OSError, TimeoutError."""
        future = self.next(answer)
        await self.say(kind, payload)
        async with asyncio.timeout(patience):
            return await future

    async def query(self, name: str, patience: float = ANSWER_S) -> list[Any]:
        """The instances of a service, which this node follows from then on. Raises OSError, TimeoutError."""
        answer = await self.ask("tablequery/request", {"sname": name, "sip": ""}, ANSWERS, patience)
        return list(orjson.loads(answer)["instance_list"])

    async def announce(self, name: str, nth: int) -> None:
        """Says that the nth of its instances is the service's. Raises OSError, TimeoutError."""
        placed = {"nsip": str(self.subnet + FIRST + nth), "nsipv6": "", "host_port": "50103", "host_ip": "127.0.0.1"}
        await self.say("service/deployed", {"appname": name, "status": "DEPLOYED", "instance_number": 0, **placed})

    async def follow(self, name: str) -> None:
        """Asks for a service, and subscribes to its notices. Raises OSError, TimeoutError."""
        assert self._session is not None
        await self._session.subscribe(f"jobs/{name}/updates_available", qos=self._qos)
        await self.query(name)

    def close(self) -> None:
        """Leaves in order."""
        if self._session is not None:
            self._session.close()


@dataclass(frozen=True)
class Heard:
    """Seconds from a change until each node knew of it, and until it had asked and was told; those that did not
    within NOTICE_S are missing."""

    notices: list[float]
    answers: list[float]


class Storm:
    """The nodes, and what they have done so far."""

    def __init__(
        self, own: Cluster, ports: list[int], manager: Manager, stack: AsyncExitStack, http: aiohttp.ClientSession
    ) -> None:
        self._own, self._ports, self._manager, self._stack, self._http = own, ports, manager, stack, http
        self.nodes: list[Node] = []

    async def register(self, number: int, qos: int) -> None:
        """A node that connects and gets its subnets."""
        node = Node(number, qos)
        self._stack.callback(node.close)
        await node.connect(self._ports[number % len(self._ports)])
        self.nodes.append(node)

    async def deploy(self, name: str) -> None:
        """A service with one instance."""
        names = dict(zip(("app", "namespace", "service", "service_namespace"), name.split("."), strict=True))
        body = orjson.dumps({**names, "instances": 1})
        async with self._http.put(f"{self._manager.url}/v1/services/{name}", data=body) as answer:
            assert answer.status in (200, 201), await answer.text()

    async def announce(self, name: str, number: int) -> None:
        """Instance `number` of all, at one of the nodes; the broker has the message when this returns."""
        place, nth = number % len(self.nodes), number // len(self.nodes)
        await self.nodes[place].announce(name, nth)

    async def settled(self, name: str) -> bool:
        """Waits until a service has its instance in the tables; whether that came within SETTLE_S."""
        try:
            async with asyncio.timeout(SETTLE_S):
                while not await self.nodes[-1].query(name, SETTLE_S):  # noqa: ASYNC110  # another process
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return False
        return True

    async def change(self, number: int) -> Heard:
        """Changes FOLLOWED once, and waits for the nodes to notice."""
        began, heard = time.monotonic(), Heard([], [])

        async def told(node: Node, notice: asyncio.Future[bytes]) -> None:
            await notice
            heard.notices.append(time.monotonic() - began)
            await node.query(FOLLOWED)
            heard.answers.append(time.monotonic() - began)

        waiting = [asyncio.create_task(told(node, node.next(NOTICE))) for node in self.nodes]
        await self.announce(FOLLOWED, (LAST - number) * len(self.nodes))
        _done, late = await asyncio.wait(waiting, timeout=NOTICE_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return heard

    async def join(self) -> str:
        """How long another manager takes to start on what is stored, in words."""
        began = time.monotonic()
        try:
            await asyncio.to_thread(self._own.manager, *OPTIONS, own_broker=False)
        except AssertionError:
            return f"not within {READY_S:g} s"
        return f"{time.monotonic() - began:.1f} s"


@dataclass(frozen=True)
class Setting:
    """What is simulated. With ``brokers`` of more than one they are a cluster, each stream on ``replicas`` of them, and
    ``managers`` are spread over them."""

    nodes: int
    services: int
    qos: int = 0
    """Of the nodes' subscriptions: 0 as our nodes, 1 as existing ones."""
    brokers: int = 1
    replicas: int = 1
    managers: int = 1
    sync: str = "always"
    """When the broker of its own writes to the disk, as `appliance cluster run --sync`."""

    @property
    def facts(self) -> dict[str, str]:
        """In words."""
        kept = f"{self.brokers}, each stream on {self.replicas}"
        return {
            "nodes, services": f"{self.nodes:,}, {self.services:,}",
            "nodes subscribe with QoS": f"{self.qos}",
            **({"brokers": kept} if self.brokers > 1 else {}),
            **({"managers": f"{self.managers}"} if self.managers > 1 else {}),
            **({"broker writes to the disk every": self.sync} if self.sync != "always" else {}),
        }


@asynccontextmanager
async def storm(setting: Setting) -> AsyncIterator[tuple[Storm, dict[str, int]]]:
    """A cluster of one manager, and no node yet; the processes by name."""
    # The broker of a manager that has ended may still write for a moment.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, cluster(Path(directory)) as own:
        managers, ports, held = _started(own, setting)
        names = {f"manager {n}" if n > 1 else "manager": it.process.popen.pid for n, it in enumerate(managers, 1)}
        async with AsyncExitStack() as stack, aiohttp.ClientSession() as http:
            made = Storm(own, ports, managers[0], stack, http)
            yield made, {**names, **held, "simulator": os.getpid()}


def _started(own: Cluster, setting: Setting) -> tuple[list[Manager], list[int], dict[str, int]]:
    """Managers, their brokers' MQTT ports, and the brokers' processes by name."""
    if setting.brokers == 1:
        options = (*OPTIONS, "--sync", setting.sync)
        managers = [own.manager(*options, own_broker=number == 0) for number in range(setting.managers)]
        return managers, [own.mqtt], {"broker": own.server_pid()}
    servers, managers = brokers.start(own.directory, own.stack, setting.brokers, setting.replicas), []
    for number in reversed(range(setting.managers)):  # the first broker is then the one that is asked later
        own.nats, own.mqtt = servers[number % len(servers)].nats, servers[number % len(servers)].mqtt
        managers.append(own.manager(*OPTIONS, "--replicas", str(setting.replicas), own_broker=False))
    return managers[::-1], [it.mqtt for it in servers], {f"broker {n}": it.pid for n, it in enumerate(servers, 1)}


async def run(setting: Setting, report: Callable[[str], None] = lambda _sentence: None) -> dict[str, str]:
    """All phases; what came of them, and each told as soon as it is over."""
    facts: dict[str, str] = {}
    async with storm(setting) as (made, held):
        for what, work in _phases(made, setting):
            with _shares(what, held, facts):
                done = await phase(what, work())
                facts |= done.facts
            report(f"{what}: {done.done:,} of {done.wanted:,} in {done.seconds:.1f} s")
            if what == ANNOUNCED:
                began = time.monotonic()
                there = await made.settled(job(setting.services - 2))
                waited = f"{time.monotonic() - began:.1f} s" if there else f"not within {SETTLE_S:g} s"
                facts["· the last of them is in the tables after that"] = waited
        with _shares("notices", held, facts):
            changes = list[Heard]()
            for number in range(CHANGES):
                changes.append(await made.change(number))
                heard = changes[-1]
                report(f"change {number + 1}: {len(heard.notices):,} heard, {len(heard.answers):,} have the new table")
            facts |= _told(len(made.nodes), changes)
        if setting.brokers == 1:
            facts["one more manager is ready after"] = await made.join()
    return facts


@contextmanager
def _shares(what: str, held: dict[str, int], facts: dict[str, str]) -> Iterator[None]:
    """Adds what each process used of a CPU while the block ran, and what memory it has at its end."""
    before, began = {name: meter.processor_s([pid]) for name, pid in held.items()}, time.monotonic()
    yield
    seconds = time.monotonic() - began
    used = {name: (meter.processor_s([pid]) - before[name]) / seconds for name, pid in held.items()}
    facts[f"· {what}, part of a CPU"] = ", ".join(f"{name} {100 * part:.0f} %" for name, part in used.items())
    facts[f"· {what}, memory then"] = ", ".join(f"{name} {meter.pss_mib(pid):.0f} MiB" for name, pid in held.items())


def _told(nodes: int, changes: list[Heard]) -> dict[str, str]:
    """How fast nodes heard, in words."""
    facts = {}
    for what, some in (
        ("notices heard", [it for one in changes for it in one.notices]),
        ("new tables had", [it for one in changes for it in one.answers]),
    ):
        facts[f"{what}, of {CHANGES} changes by {nodes:,} nodes"] = f"{len(some):,}"
        if some:
            p50, p99, last = np.percentile(some, (50, 99, 100)) * 1e3
            facts[f"· {what}, from the announcement: median, 99 %, last"] = f"{p50:.0f} ms, {p99:.0f} ms, {last:.0f} ms"
    return facts


def _phases(made: Storm, setting: Setting) -> Iterator[tuple[str, Callable[[], list[Callable[[], Awaitable[object]]]]]]:
    """Names and pieces of work; the pieces are made when their turn comes, as they depend on the phases before."""
    names, qos = [FOLLOWED, *map(job, range(setting.services - 1))], setting.qos
    yield (
        "nodes registered",
        lambda: [lambda n=n: made.register(n, qos) for n in range(setting.nodes)],  # type: ignore[misc]
    )
    yield "services deployed", lambda: [lambda n=n: made.deploy(n) for n in names]  # type: ignore[misc]
    yield (
        ANNOUNCED,
        lambda: [lambda n=n, i=i: made.announce(n, i) for i, n in enumerate(names)],  # type: ignore[misc]
    )
    yield "nodes that follow a service", lambda: [lambda n=n: n.follow(FOLLOWED) for n in made.nodes]  # type: ignore[misc]


def measure(setting: Setting, report: Callable[[str], None]) -> Study:
    """A storm."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, setting.nodes + 1024), hard))
    facts = uvloop.run(run(setting, report))
    return study("storm", __doc__ or "", {**setting.facts, **facts})
