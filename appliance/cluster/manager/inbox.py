"""Takes nodes' messages from the broker: each by one manager, again by another one if that dies.

Theory of operation
-------------------
A work-queue stream in the broker collects what nodes publish for us, and all managers are one queue group on it. A
message leaves the stream when it was carried out and its answers were acknowledged by the broker. A manager that dies
takes nothing with it: what it held is handed out again after ACK_WAIT_S, well before a node's deadline of 5 s for a
table query and 10 s for its subnets. What nodes publish while no manager runs waits for up to STALE_S.

A message that is no valid request is counted, logged and dropped. A fault of ours is logged, and the message handed
out again up to DELIVERIES times.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import BadRequestError

from appliance.cluster.manager import topics
from appliance.cluster.manager.addresses import ExhaustedError
from appliance.cluster.manager.decide import Origin, RefusedError
from appliance.cluster.manager.requests import Request, RequestError, parse
from appliance.cluster.manager.store import UnavailableError

log = logging.getLogger(__name__)

ACK_WAIT_S = 2.0
"""How long a manager may hold a message before it is given to another."""
STALE_S = 3600.0
"""Age at which a message is dropped that nobody took."""
PENDING_MAX = 256
"""Messages that all managers together hold; more wait in the broker. Few enough that a manager that carries out 128 a
second has still acknowledged one before ACK_WAIT_S: what is handed out again while it is worked on is done twice."""
DELIVERIES = 10
"""How often a message is handed out at most."""
AGAIN_S = 0.5
"""Pause before a message is handed out again that could not be carried out."""
LOUD = 20
"""Wrong messages of one kind that are logged each; of later ones every hundredth is."""

Handler = Callable[[Origin, Request], Awaitable[None]]


class Inbox:
    """The managers' share in the stream of requests. `counts` are by kind: taken, bad, refused, failed."""

    def __init__(self, client: Client, name: str, handler: Handler, replicas: int = 1) -> None:
        self._js = client.jetstream()
        self._name = name
        self._handler = handler
        self._replicas = replicas
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    async def create(self) -> None:
        """Creates the stream, or brings an existing one to this version's topics. Raises UnavailableError."""
        config = StreamConfig(
            name=self._name,
            subjects=[topics.to_filter(one) for one in topics.REQUEST_TOPICS],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            max_age=STALE_S,
            num_replicas=self._replicas,
        )
        try:
            try:
                await self._js.add_stream(config)
            except BadRequestError:  # there is one of an earlier version, with other topics
                await self._js.update_stream(config)
        except (NatsError, TimeoutError) as error:
            raise UnavailableError(f"stream {self._name}: {error!r}") from error

    async def last(self) -> int:
        """The number of the newest message."""
        return (await self._js.stream_info(self._name)).state.last_seq

    async def open(self) -> None:
        """Joins the queue group. Raises UnavailableError."""
        config = ConsumerConfig(
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_S,
            deliver_policy=DeliverPolicy.ALL,
            max_ack_pending=PENDING_MAX,
            max_deliver=DELIVERIES,
        )
        group = "managers"
        try:
            await self._js.subscribe(
                "", queue=group, durable=group, stream=self._name, cb=self._take, manual_ack=True, config=config
            )
        except (NatsError, TimeoutError) as error:
            raise UnavailableError(f"queue group of {self._name}: {error!r}") from error

    async def _take(self, message: Msg) -> None:
        """Begins to carry out a message; the next one does not wait for it."""
        task = asyncio.create_task(self._carry_out(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, message: Msg) -> None:
        finish = message.ack
        try:
            await self._handle(message)
        except RequestError as error:
            self._drop("bad", error)
        except (RefusedError, ExhaustedError) as error:
            self._drop("refused", error)
        except UnavailableError as error:
            self._drop("failed", error)
            finish = partial(message.nak, delay=AGAIN_S)
        except Exception:
            self.counts["failed"] += 1
            log.exception("message not carried out", extra={"subject": message.subject})
            finish = partial(message.nak, delay=AGAIN_S)
        await _quietly(finish)

    async def _handle(self, message: Msg) -> None:
        node, request = parse(topics.to_topic(message.subject), message.data)
        self.counts["taken"] += 1
        if request is not None:
            await self._handler(Origin(node, message.metadata.sequence.stream), request)

    def _drop(self, kind: str, error: Exception) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= LOUD or self.counts[kind] % 100 == 0:
            log.warning("message %s", kind, extra={"error": error, "count": self.counts[kind]})

    async def close(self) -> None:
        """Waits for what was begun."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=ACK_WAIT_S)


async def _quietly(finish: Callable[[], Awaitable[object]]) -> None:
    """Tells the broker how a message ended. If that fails the broker hands it out again, which does no harm."""
    try:
        await finish()
    except NatsError as error:
        log.debug("not acknowledged", extra={"error": error})
