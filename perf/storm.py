"""Thousands of simulated nodes against one cluster service manager: how fast it takes them, and how fast it tells them.

Real manager, real broker, over loopback; each node is an MQTT connection as existing nodes make it
(`tests.manager.node`), all of them in this one process, which competes with what it measures for the CPUs. Phases,
one after the other:

1. nodes      connect and get their subnets
2. services   are deployed over the REST interface, with one instance each
3. instances  are announced by their nodes
4. notices    all nodes follow one service; it changes CHANGES times, and each node notes when it heard

A phase ends after PHASE_S seconds, done or not: the number that it reached is the result then, and what follows goes
on with that. So the study also tells where it breaks."""

from __future__ import annotations

import asyncio
import resource
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import aiohttp
import numpy as np

from perf import meter
from perf.study import Study, study
from tests.manager.node import Node, connect
from tests.manager.processes import Cluster, Manager, cluster

NODES: Final = 5_000
SERVICES: Final = 50_000
PHASE_S: Final = 120.0
SETTLE_S: Final = 600.0
"""Seconds in which the manager may work off what the broker has taken for it."""
AT_ONCE: Final = 32
"""Requests of one kind under way: a manager is asked by many, and not by all at the same moment."""
CHANGES: Final = 5
NOTICE_S: Final = 30.0
FOLLOWED: Final = "storm.perf.followed.test"
OPTIONS: Final = ("--services-v4", "10.128.0.0/9", "--subnets-v4", "10.64.0.0/10")
"""Ranges that hold as many: the usual ones end at 4,096 nodes and 65,536 addresses."""
FIRST: Final = 2
"""Host number of a node's first instance: after its subnet's own address and the gateway."""
ANNOUNCED: Final = "instances announced"
LAST: Final = 50
"""Of the instances that a subnet of the usual size holds beside those of this study."""
FILES_A_NODE: Final = 4


@dataclass(frozen=True)
class Phase:
    """How many of how many were done in so many seconds, and how long one took."""

    what: str
    wanted: int
    done: int
    seconds: float
    times: list[float]

    @property
    def facts(self) -> dict[str, str]:
        """In words."""
        reached = (
            f"{self.done:,}" if self.done == self.wanted else f"{self.done:,} of {self.wanted:,} in the time given"
        )
        facts = {self.what: reached, f"· {self.what} a second": f"{self.done / self.seconds:,.0f}"}
        if self.times:
            p50, p99 = np.percentile(self.times, (50, 99)) * 1e3
            facts[f"· time of one, {AT_ONCE} at once: median, 99 %"] = f"{p50:.1f} ms, {p99:.1f} ms"
        return facts


async def phase(what: str, work: list[Callable[[], Awaitable[object]]]) -> Phase:
    """Does pieces of work, AT_ONCE at a time, until all are done or the time is over. A piece that fails is not
    done."""
    began, times, pieces = time.monotonic(), list[float](), iter(work)

    async def worker() -> None:
        for piece in pieces:
            left = began + PHASE_S - time.monotonic()
            if left <= 0:
                return
            at = time.monotonic()
            try:
                async with asyncio.timeout(left):
                    await piece()
            except (TimeoutError, OSError, AssertionError, aiohttp.ClientError):
                continue
            times.append(time.monotonic() - at)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return Phase(what, len(work), len(times), time.monotonic() - began, times)


def job(number: int) -> str:
    """A service's name."""
    return f"storm.perf.s{number}.test"


class Storm:
    """The nodes, and what they have done so far."""

    def __init__(self, own: Cluster, manager: Manager, stack: AsyncExitStack, http: aiohttp.ClientSession) -> None:
        self._own, self._manager, self._stack, self._http = own, manager, stack, http
        self.nodes: list[Node] = []
        self._subnets: list[IPv4Address] = []

    async def register(self, number: int) -> None:
        """A node that connects and gets its subnets."""
        node = await self._stack.enter_async_context(connect(self._own.mqtt, f"{number:024x}", will=True))
        subnet = await node.subnet()
        self.nodes.append(node)
        self._subnets.append(IPv4Address(subnet["address"].partition("/")[0]))

    async def deploy(self, name: str) -> None:
        """A service with one instance."""
        names = dict(zip(("app", "namespace", "service", "service_namespace"), name.split("."), strict=True))
        body = {**names, "instances": 1}
        async with self._http.put(f"{self._manager.url}/v1/services/{name}", json=body) as answer:
            assert answer.status in (200, 201), await answer.text()

    async def announce(self, name: str, number: int) -> None:
        """Instance `number` of all, at one of the nodes; the broker has the message when this returns."""
        place, nth = number % len(self.nodes), number // len(self.nodes)
        await self.nodes[place].deployed(name, 0, str(self._subnets[place] + FIRST + nth), host="127.0.0.1")

    async def settled(self, name: str) -> bool:
        """Waits until a service has its instance in the tables; whether that came within SETTLE_S."""
        try:
            async with asyncio.timeout(SETTLE_S):
                while not await self._is_there(name):  # noqa: ASYNC110  # another process
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return False
        return True

    async def _is_there(self, name: str) -> bool:
        """Whether the answer to a query has an instance; it may be long in coming."""
        node = self.nodes[-1]
        await node.say("tablequery/request", {"sname": name, "sip": ""})
        return bool((await node.hear("/tablequery/result", SETTLE_S)).payload["instance_list"])

    async def follow(self, node: Node) -> None:
        """A node that hears of changes of FOLLOWED."""
        await node.listen(FOLLOWED)

    async def change(self, number: int) -> list[float]:
        """Seconds until each node that follows has heard of a change; those that did not within NOTICE_S are
        missing."""
        began = time.monotonic()

        async def heard(node: Node) -> float | None:
            try:
                await node.hear("/updates_available", NOTICE_S)
            except TimeoutError:
                return None
            return time.monotonic() - began

        waiting = [asyncio.create_task(heard(node)) for node in self.nodes]
        await self.announce(FOLLOWED, (LAST - number) * len(self.nodes))
        return [it for it in await asyncio.gather(*waiting) if it is not None]


@asynccontextmanager
async def storm() -> AsyncIterator[tuple[Storm, Cluster, Manager]]:
    """A cluster of one manager, and no node yet."""
    # The broker of a manager that has ended may still write for a moment.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, cluster(Path(directory)) as own:
        manager = own.manager(*OPTIONS)
        async with AsyncExitStack() as stack, aiohttp.ClientSession() as http:
            yield Storm(own, manager, stack, http), own, manager


async def run(nodes: int, services: int) -> dict[str, str]:
    """All phases; what came of them."""
    facts: dict[str, str] = {}
    async with storm() as (made, own, manager):
        held = {"manager": manager.process.popen.pid, "broker": own.server_pid()}
        for what, work in _phases(made, nodes, services):
            facts |= (await phase(what, work())).facts
            memory = ", ".join(f"{name} {meter.pss_mib(pid):.0f} MiB" for name, pid in held.items())
            facts[f"· memory after {what}"] = memory
            if what == ANNOUNCED:
                began = time.monotonic()
                there = await made.settled(job(services - 2))
                waited = f"{time.monotonic() - began:.1f} s" if there else f"not within {SETTLE_S:g} s"
                facts["· the last of them is in the tables after that"] = waited
        delays = [delay for number in range(CHANGES) for delay in await made.change(number)]
        facts[f"notices heard, of {CHANGES} changes by {len(made.nodes):,} nodes"] = f"{len(delays):,}"
        if delays:
            p50, p99, last = np.percentile(delays, (50, 99, 100)) * 1e3
            facts["· from the announcement: median, 99 %, last"] = f"{p50:.0f} ms, {p99:.0f} ms, {last:.0f} ms"
    return facts


def _phases(
    made: Storm, nodes: int, services: int
) -> Iterator[tuple[str, Callable[[], list[Callable[[], Awaitable[object]]]]]]:
    """Names and pieces of work; the pieces are made when their turn comes, as they depend on the phases before."""
    names = [FOLLOWED, *map(job, range(services - 1))]
    yield "nodes registered", lambda: [lambda n=n: made.register(n) for n in range(nodes)]  # type: ignore[misc]
    yield "services deployed", lambda: [lambda n=n: made.deploy(n) for n in names]  # type: ignore[misc]
    yield (
        ANNOUNCED,
        lambda: [lambda n=n, i=i: made.announce(n, i) for i, n in enumerate(names)],  # type: ignore[misc]
    )
    yield "nodes that follow a service", lambda: [lambda n=n: made.follow(n) for n in made.nodes]  # type: ignore[misc]


def measure(nodes: int = NODES, services: int = SERVICES) -> Study:
    """A storm of so many nodes and services."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, FILES_A_NODE * nodes + 1024), hard))
    facts = asyncio.run(run(nodes, services))
    return study("storm", __doc__ or "", {"nodes, services": f"{nodes:,}, {services:,}", **facts})
