"""The key-value bucket: one JetStream stream, mirrored into a `State`, written by transactions.

Theory of operation
-------------------
Every manager keeps a mirror of the whole bucket, fed by an ordered consumer. The stream is one sequence, so a mirror
that has seen revision R is the bucket as it was at R, not a mixture. `catch_up` makes the mirror as new as the moment
of the call; `commit` writes all changes of a group or none (atomic batch publish, nats-server 2.12), each on
condition that its key is still at the revision that the mirror had. So a decision on an old mirror loses
(`ConflictError`) and is taken again on a newer one; nobody locks anything.

A document that cannot be read stops all decisions, as what it says might be given to somebody else.

A new connection, and a feed that has stalled for FEED_S, make the mirror anew. A feed that is behind and moves is
waited for, however long it takes: reading all anew is the longest way to what it already brings. Deletions leave a
marker that the server drops after MARKER_S, far later than any feed stays behind.

A full collection of cyclic garbage would walk the whole mirror: 0.4 s with 100,000 documents, in which nobody is
answered. So documents are taken out of the collector's sight (`appliance.collector`), each time that YOUNG_MAX more
have come. A new mirror begins with everything back under its eyes.

What is written is on the disk of the broker before `commit` returns, if the broker synchronises always, as ours does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import DeliverPolicy, DiscardPolicy, Header, StorageType, StreamConfig
from nats.js.errors import NotFoundError

from appliance.cluster.manager.documents import Document, DocumentError, decode, encode
from appliance.cluster.manager.state import State
from appliance.collector import Settling

log = logging.getLogger(__name__)

BATCH_MAX = 1000
"""Writes in one transaction that nats-server accepts."""
MARKER_S = 3600
"""How long the marker of a deleted key is kept."""
FEED_S = 2.0
"""How long the feed may bring nothing while it lacks a revision that is known to exist; then it is opened anew."""
READ_S = 1.0
"""How long the broker may take to answer a question. One that was lost with its connection is asked again."""
COMMIT_S = 5.0
"""How long a transaction may take. After that its fate is unknown, and a newer mirror tells it."""
YOUNG_MAX = 5_000
"""Documents of the feed that the collector of cyclic garbage may know: it walks them in some 20 ms."""
CONFLICTS = frozenset({10071, 10164})
"""JSStreamWrongLastSequenceErrF and …ConstantErr of nats-server."""
OPERATION = "KV-Operation"
MARKER = "Nats-Marker-Reason"


class ConflictError(Exception):
    """Somebody else wrote one of the keys first. Nothing was written."""


class UnavailableError(Exception):
    """The broker gave no answer, or none of use; the text says what it said."""


class Store:
    """One bucket. `state` is its mirror; it is another object after `reload`."""

    def __init__(self, client: Client, bucket: str, replicas: int = 1) -> None:
        self._client = client
        self._js: JetStreamContext = client.jetstream(timeout=READ_S)
        self._stream = f"KV_{bucket}"
        self._prefix = f"$KV.{bucket}."
        self._replicas = replicas
        self._feed: Any = None
        self._seen = 0
        self._connection = 0
        self._unreadable: DocumentError | None = None
        self._settling = Settling(YOUNG_MAX)
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self.changed: Callable[[str, Document | None, Document | None], None] = lambda _key, _before, _after: None
        """Told of each document of the feed: what the mirror had before, and has now."""
        self.reloaded: Callable[[], None] = lambda: None
        """Told that ``state`` is another object."""
        self.state = State()

    async def open(self) -> None:
        """Creates the bucket if there is none, and loads it. Raises UnavailableError."""
        try:
            await self._ensure()
        except (NatsError, TimeoutError) as error:
            raise UnavailableError(f"bucket {self._stream}: {error!r}") from error
        await self.reload()

    async def _ensure(self) -> None:
        try:
            info = await self._js.stream_info(self._stream)
        except NotFoundError:
            info = await self._js.add_stream(self._config())
        if not info.config.allow_atomic:
            raise UnavailableError(f"{self._stream}: expected atomic batches, which nats-server has from 2.12 on")

    def _config(self) -> StreamConfig:
        """A stream that key-value clients read as a bucket, with transactions."""
        return StreamConfig(
            name=self._stream,
            subjects=[f"{self._prefix}>"],
            max_msgs_per_subject=1,
            storage=StorageType.FILE,
            num_replicas=self._replicas,
            discard=DiscardPolicy.NEW,
            deny_delete=True,
            allow_rollup_hdrs=True,
            allow_direct=True,
            allow_atomic=True,
            allow_msg_ttl=True,
        )

    # --- mirror ---------------------------------------------------------------------------------

    async def reload(self) -> None:
        """Makes the mirror anew. Raises UnavailableError; the old mirror then stays, and is as old as it is."""
        await self.close()
        gc.unfreeze()
        state, self._seen, self._unreadable = State(), 0, None
        self._connection = self._client.stats["reconnects"]
        try:
            count, target = await self._count(), await self._last()
            self._feed = await self._subscribe(state)
            await self._reach(target)
        except (NatsError, TimeoutError) as error:
            raise UnavailableError(f"mirror of {self._stream}: {error!r}") from error
        self._seen = max(self._seen, count)  # of what lies between, nothing was left when the newest was looked for
        self.state = state
        self._settling.settle()
        self.reloaded()

    async def _subscribe(self, state: State) -> Any:
        async def take(message: Msg) -> None:
            self._take(state, message)

        policy = DeliverPolicy.LAST_PER_SUBJECT
        return await self._js.subscribe(f"{self._prefix}>", ordered_consumer=True, deliver_policy=policy, cb=take)

    async def catch_up(self) -> None:
        """Makes the mirror as new as the moment of the call. Raises UnavailableError."""
        if not self._client.is_connected:
            raise UnavailableError("the broker is away")
        if self._connection != self._client.stats["reconnects"]:
            await self.reload()
        try:
            await self._reach(await self._count())
        except TimeoutError:
            await self.reload()
        except NatsError as error:
            raise UnavailableError(f"{self._stream}: {error!r}") from error

    async def _count(self) -> int:
        """The revision of the newest write. It may be of a marker that was dropped since, which a feed that follows
        has seen, and a new one has not."""
        return (await self._js.stream_info(self._stream)).state.last_seq

    async def _last(self) -> int:
        """The revision of the newest document or marker that is still there. The broker looks at all keys for it: 2 ms
        with 50,000, so this is asked of a new feed only."""
        try:
            return (await self._js.get_msg(self._stream, subject=f"{self._prefix}>", direct=False)).seq or 0
        except NotFoundError:
            return 0

    async def _reach(self, revision: int) -> None:
        """Waits for a revision as long as the feed moves. Raises TimeoutError when it stalls, UnavailableError."""
        while self._seen < revision:
            seen = self._seen
            reached = asyncio.get_running_loop().create_future()
            self._waiting.append((revision, reached))
            try:
                await asyncio.wait_for(reached, FEED_S)
            except TimeoutError:
                if self._seen == seen:
                    raise
        if self._unreadable is not None:
            raise UnavailableError(f"{self._stream}: {self._unreadable}")

    def _take(self, state: State, message: Msg) -> None:
        """One document, or marker, from the feed."""
        revision = message.metadata.sequence.stream
        key = message.subject.removeprefix(self._prefix)
        gone = bool(message.headers and (OPERATION in message.headers or MARKER in message.headers))
        try:
            before = state.document(key)
            state.apply(key, None if gone else decode(key, message.data), revision)
            self.changed(key, before, state.document(key))
        except DocumentError as error:
            self._unreadable = error
        self._seen = revision
        self._wake()
        self._settling.came()

    def _wake(self) -> None:
        still = []
        for revision, reached in self._waiting:
            if reached.done():
                continue
            if revision <= self._seen:
                reached.set_result(None)
            else:
                still.append((revision, reached))
        self._waiting = still

    # --- writing --------------------------------------------------------------------------------

    async def commit(self, changes: Mapping[str, tuple[Document | None, int]]) -> None:
        """Writes documents by key, each on condition of its revision, all or none; the mirror then has them.

        Raises ConflictError, and UnavailableError: then it may have been written nevertheless.
        """
        batch = uuid4().hex
        last = len(changes)
        try:
            for number, (key, (document, revision)) in enumerate(changes.items(), 1):
                headers = _headers(batch, number, revision, document)
                subject, value = f"{self._prefix}{key}", encode(document) if document else b""
                if number < last:
                    await self._client.publish(subject, value, headers=headers)
            headers[Header.BATCH_COMMIT.value] = "1"
            answer = await self._client.request(subject, value, timeout=COMMIT_S, headers=headers)
            await self._reach(_revision(answer.data))
        except (NatsError, TimeoutError) as error:
            raise UnavailableError(f"transaction in {self._stream}: {error!r}") from error

    async def close(self) -> None:
        """Ends the feed."""
        feed, self._feed = self._feed, None
        if feed is not None and self._client.is_connected:
            await feed.unsubscribe()


def _headers(batch: str, number: int, revision: int, document: Document | None) -> dict[str, str]:
    headers = {
        Header.BATCH_ID.value: batch,
        Header.BATCH_SEQUENCE.value: str(number),
        Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(revision),
    }
    return headers if document else {**headers, OPERATION: "DEL", Header.MSG_TTL.value: f"{MARKER_S}s"}


def _revision(answer: bytes) -> int:
    """The revision of a transaction's last write. Raises ConflictError or UnavailableError."""
    data = json.loads(answer)
    error = data.get("error")
    if error is None:
        return int(data["seq"])
    if error.get("err_code") in CONFLICTS:
        raise ConflictError(error.get("description"))
    raise UnavailableError(str(error.get("description")))
