"""A member under test, its configuration, and what it told the supervisor."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvloop

from appliance.cluster.feed import Tables
from appliance.cluster.member import Member
from appliance.config import Config
from tests.cluster import wire

DEADLINE = 20.0
"""Seconds for one test; each takes a small part of it."""


def config(state: Path, port: int, node: str = wire.NODE, **cluster: Any) -> Config:
    """A configuration of a member of the cluster at a port of the loopback."""
    section = {"url": "127.0.0.1", "port": port} | cluster
    return Config.model_validate({"node": {"id": node}, "cluster": section, "paths": {"state": state}})


class Subject:
    """A member and the tables that it published."""

    def __init__(self, settings: Config, address: str) -> None:
        self.tables: dict[str, list[int]] = {}
        self.nodes: dict[str, str] = {}
        self.changes: list[frozenset[str]] = []
        self.member = Member(settings, ip_address(address), wire.PORT, self._publish)

    def _publish(self, tables: Tables) -> None:
        self.tables = {it.job: [one.number for one in it.instances if one.is_deployed] for it in tables}
        self.nodes = {node: str(it.address) for node, it in tables.nodes.items()}
        if tables.changed:
            self.changes.append(tables.changed)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that has no event."""
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def connected(self, *, connected: bool = True) -> None:
        await self.until(lambda: self.member.status()["connected"] is connected)


@asynccontextmanager
async def started(settings: Config, address: str = wire.ADDRESS) -> AsyncIterator[Subject]:
    """A member that was started; it is stopped at the end."""
    subject = Subject(settings, address)
    await subject.member.start()
    subject.member.serve()
    try:
        yield subject
    finally:
        await subject.member.stop()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a test in the supervisor's kind of event loop."""

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await test()
        await asyncio.sleep(0)  # a task that was cancelled last
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"left running: {left}"

    uvloop.run(bounded())
