"""Changes on their way to the tables."""

import asyncio
import time

from appliance.cluster.feed import Feed, Tables
from tests.cluster.member import run


class Supervisor:
    """Takes some time for its tables, or refuses them."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.refuses = False
        self.changes: list[set[str]] = []

    def __call__(self, tables: Tables) -> None:
        if self.refuses:
            raise RuntimeError("tables.hosts: expected room")
        time.sleep(self.seconds)
        self.changes.append(set(tables.changed))


def test_who_waits_goes_on_after_the_change_is_published() -> None:
    async def test() -> None:
        supervisor = Supervisor()
        feed = Feed({}, supervisor)
        order: list[object] = []
        feed.then(lambda: order.append("nothing to wait for"))
        feed.change({"a"})
        feed.change({"b"})
        feed.then(lambda: order.append(list(supervisor.changes)))
        await asyncio.sleep(0.01)
        assert order == ["nothing to wait for", [{"a", "b"}]]

    run(test)


def test_changes_during_a_long_publication_become_one() -> None:
    async def test() -> None:
        supervisor = Supervisor(seconds=0.1)
        feed = Feed({}, supervisor)
        feed.change({"first"})
        await asyncio.sleep(0)
        began = time.monotonic()
        while time.monotonic() - began < 0.05 or len(supervisor.changes) < 2:
            feed.change({f"{time.monotonic()}"})
            await asyncio.sleep(0.005)
        assert supervisor.changes[0] == {"first"}
        assert len(supervisor.changes[1]) > 5

    run(test)


def test_what_was_refused_is_part_of_the_next_attempt() -> None:
    async def test() -> None:
        supervisor = Supervisor()
        supervisor.refuses = True
        feed = Feed({}, supervisor)
        feed.change({"a"})
        feed.flush()
        assert feed.failures == 1
        supervisor.refuses = False
        feed.change({"b"})
        feed.flush()
        assert supervisor.changes == [{"a", "b"}]
        feed.flush()
        assert len(supervisor.changes) == 1

    run(test)
