"""The mirror: what it costs the broker to keep it, and when it is made anew. Operations are counted, not timed."""

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.cluster.manager import store as module
from appliance.cluster.manager.documents import Job, encode, job_key
from appliance.cluster.manager.store import Store, UnavailableError

BUCKET = "test"
KEYS = 40
PAUSE_S = 0.005


class Stream:
    """A bucket of KEYS documents in a broker that delivers each after a pause, and counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.newest = self.count = KEYS
        self.deliver_up_to = KEYS
        self.dropped: set[int] = set()
        self._feeds: list[asyncio.Task[None]] = []
        self._written = asyncio.Event()

    async def stream_info(self, _stream: str) -> Any:
        """Constant work for the broker."""
        self.asked["info"] += 1
        return SimpleNamespace(state=SimpleNamespace(last_seq=self.count))

    async def get_msg(self, _stream: str, **_options: Any) -> Any:
        """Work that grows with the bucket."""
        self.asked["newest"] += 1
        return SimpleNamespace(seq=self.newest)

    async def subscribe(self, _subject: str, cb: Callable[[Any], Awaitable[None]], **_options: Any) -> Any:
        """A feed, which takes as long as it takes."""
        self.asked["feed"] += 1
        self._feeds.append(asyncio.create_task(self._deliver(cb)))
        return self

    async def unsubscribe(self) -> None:
        """Ends the newest feed."""
        self._feeds[-1].cancel()

    def write(self) -> None:
        """One more document."""
        self.newest = self.count = self.deliver_up_to = self.count + 1
        self._written.set()

    async def _deliver(self, heard: Callable[[Any], Awaitable[None]]) -> None:
        at = 0
        while True:
            while at < self.deliver_up_to:
                at += 1
                if at in self.dropped:
                    continue
                await asyncio.sleep(PAUSE_S)
                self.asked["delivered"] += 1
                await heard(_message(at))
            self._written.clear()
            await self._written.wait()


def _message(revision: int) -> Any:
    metadata = SimpleNamespace(sequence=SimpleNamespace(stream=revision))
    subject = f"$KV.{BUCKET}.{job_key(f'a.b.c{revision}.d')}"
    return SimpleNamespace(subject=subject, data=encode(Job()), headers=None, metadata=metadata)


def _store(stream: Stream) -> Store:
    client = SimpleNamespace(is_connected=True, stats={"reconnects": 0}, jetstream=lambda **_options: stream)
    return Store(client, BUCKET)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed counts as stalled after less than what all documents take, and far more than one takes."""
    monkeypatch.setattr(module, "FEED_S", KEYS * PAUSE_S / 2)


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    """The process of the tests keeps nothing of this from its collector."""
    yield
    gc.unfreeze()


def test_a_feed_that_is_behind_and_moves_is_waited_for() -> None:
    """50,000 documents take longer than FEED_S to read: made anew each time that is over, the mirror never ended."""

    async def main() -> None:
        stream = Stream()
        store = _store(stream)
        await store.reload()
        assert len(store.state.jobs()) == KEYS
        assert stream.asked == {"info": 1, "newest": 1, "feed": 1, "delivered": KEYS}
        await store.close()

    asyncio.run(main())


def test_a_feed_that_stalls_is_given_up() -> None:
    async def main() -> None:
        stream = Stream()
        stream.deliver_up_to = KEYS // 2
        store = _store(stream)
        with pytest.raises(UnavailableError, match="mirror"):
            await store.reload()
        await store.close()

    asyncio.run(main())


def test_a_decision_asks_the_broker_for_nothing_that_grows_with_the_bucket() -> None:
    async def main() -> None:
        stream = Stream()
        store = _store(stream)
        await store.reload()
        before = stream.asked.copy()
        for _ in range(5):
            stream.write()
            await store.catch_up()
        assert len(store.state.jobs()) == KEYS + 5
        assert stream.asked - before == {"info": 5, "delivered": 5}
        await store.close()

    asyncio.run(main())


def test_a_marker_that_was_dropped_before_the_feed_began_is_not_waited_for() -> None:
    async def main() -> None:
        stream = Stream()
        stream.count = KEYS + 3
        stream.dropped.update(range(KEYS + 1, stream.count + 1))
        store = _store(stream)
        await store.reload()
        await store.catch_up()
        stream.write()
        await store.catch_up()
        assert len(store.state.jobs()) == KEYS + 1
        assert stream.asked["feed"] == 1
        await store.close()

    asyncio.run(main())


def test_the_garbage_collector_does_not_walk_the_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "YOUNG_MAX", 10)

    async def main() -> None:
        stream = Stream()
        store = _store(stream)
        await store.reload()
        for _ in range(10):
            stream.write()
            await store.catch_up()
        walked = {id(it) for it in gc.get_objects()}
        assert len(store.state.jobs()) == KEYS + 10
        assert not [job for job in store.state.jobs() if id(store.state.job(job)) in walked]
        await store.close()

    asyncio.run(main())
