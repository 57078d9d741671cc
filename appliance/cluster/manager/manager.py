"""One cluster service manager: broker, store, inbox, outbox and REST put together.

Theory of operation
-------------------
Nodes speak MQTT with the broker; the broker hands their messages to one of the managers (`inbox`), which decides
(`decide`, pure), writes (`executor`, `store`) and answers (`outbox`). Nothing of the cluster is kept in this process
but the mirror, so any number of managers may run, and each may be killed at any time.

A manager without ``--broker`` also runs the broker, and with it the roll call: after the broker's start it waits
ROLL_CALL_S for the nodes that were there before, and counts those as lost that did not come back. Where the broker is
one of several (`--route`), nodes may be at any of them, and who is connected is asked instead (`presence`).

Any part that ends by an error ends the manager; whoever started it starts it again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import nats
from nats.aio.client import Client
from nats.errors import Error as NatsError

from appliance.cluster.manager.addresses import ExhaustedError
from appliance.cluster.manager.broker import SYSTEM, Broker
from appliance.cluster.manager.decide import Decision, Origin, Outcome, decide, missed
from appliance.cluster.manager.documents import Document
from appliance.cluster.manager.executor import Executor
from appliance.cluster.manager.exposing import Exposing
from appliance.cluster.manager.inbox import Inbox
from appliance.cluster.manager.leaving import Leaving
from appliance.cluster.manager.listing import Listing
from appliance.cluster.manager.outbox import Outbox
from appliance.cluster.manager.pki import MANAGER, Pki, PkiError
from appliance.cluster.manager.presence import ROUNDS, Presence
from appliance.cluster.manager.requests import Request
from appliance.cluster.manager.settings import Settings, reachable
from appliance.cluster.manager.store import Store, UnavailableError

log = logging.getLogger(__name__)

CONNECT_S = 20.0
"""How long the broker may take to accept us at the start."""
RECONNECT_S = 0.2
"""Pause between attempts to connect to the broker again."""
QUORUM_S = 1.0
"""Pause between attempts to open the state, where the broker waits for others."""


class Manager:
    """A manager that is connected to its broker."""

    def __init__(self, settings: Settings, client: Client) -> None:
        self.settings = settings
        self._client = client
        host, port = settings.mqtt
        self.store = Store(client, f"{settings.cluster}-cluster", settings.replicas)
        self.executor = Executor(self.store)
        self.inbox = Inbox(client, f"{settings.cluster}-requests", self._handle, settings.replicas)
        self.outbox = Outbox(reachable(host), port, _tls(settings))
        self.listing = Listing(self.store, self.outbox)
        self.exposing = Exposing(self.store, self.outbox)
        self.leaving = Leaving(self.store, self.do_all)
        self.store.changed = self._changed
        self.store.reloaded = self._reloaded

    def _changed(self, key: str, before: Document | None, after: Document | None) -> None:
        self.listing.changed(key, before, after)
        self.exposing.changed(key, before, after)
        self.leaving.changed(key, before, after)

    def _reloaded(self) -> None:
        self.listing.reloaded()
        self.exposing.reloaded()
        self.leaving.reloaded()

    async def do(self, decision: Decision) -> Outcome:
        """Carries out a decision and delivers its messages. Raises what it raises, and UnavailableError."""
        outcome = await self.executor.submit(decision)
        await self.outbox.send(outcome.messages)
        return outcome

    async def do_all(self, decision: Decision) -> bool:
        """Repeats a decision until it has nothing left to change; whether it had anything."""
        changed = False
        while (await self.do(decision)).changes:
            changed = True
        return changed

    async def _handle(self, origin: Origin, request: Request) -> None:
        plan, cluster = self.settings.plan, self.settings.cluster
        await self.do(lambda state: decide(state, plan, cluster, origin, request))

    def presence(self, system: Client) -> Presence:
        """Who is connected, asked in the broker's system account."""
        rounds = self.settings.roll_call_s / ROUNDS
        return Presence(system, rounds, self._there, self.inbox.last, self._lose)

    def _there(self) -> dict[str, bool | None]:
        state = self.store.state
        nodes = {name: state.node(name) for name in state.nodes()}
        return {name: node.online for name, node in nodes.items() if node is not None}

    async def _lose(self, node: str, since: int) -> None:
        await self.do(partial(missed, since, Origin(node, max(await self.inbox.last(), since + 1))))

    async def roll_call(self) -> None:
        """Counts nodes as lost that do not come back after the broker's start."""
        since = await self.inbox.last()
        await asyncio.sleep(self.settings.roll_call_s)
        for node in self.store.state.nodes():
            try:
                await self._lose(node, since)
            except (UnavailableError, ExhaustedError) as error:
                log.error("roll call failed", extra={"node": node, "error": error})

    @property
    def health(self) -> dict[str, Any]:
        """Whether nodes get answers, and what has happened so far."""
        connected = {"broker": self._client.is_connected, "mqtt": self.outbox.is_connected}
        counts = dict(self.inbox.counts)
        state = self.store.state
        size = {"nodes": len(state.nodes()), "services": len(state.jobs())}
        return {
            "ok": all(connected.values()),
            **connected,
            "messages": counts,
            "conflicts": self.executor.conflicts,
            **size,
        }


async def run(settings: Settings) -> int:
    """Runs a manager until SIGTERM or SIGINT. Raises BrokerError, UnavailableError and OSError at the start."""
    from appliance.cluster.manager.rest import serve

    stop = _stopped_by_signals()
    async with AsyncExitStack() as stack:
        broker = None if settings.broker else await _embedded(settings, stack)
        client = await _connected(settings, stack)
        manager = Manager(settings, client)
        if not await _opened(manager, broker, stop):
            return 0
        stack.push_async_callback(manager.store.close)
        site = await serve(manager)
        stack.push_async_callback(site.cleanup)
        async with asyncio.TaskGroup() as tasks:
            running: list[asyncio.Task[Any]] = [
                tasks.create_task(manager.executor.run()),
                tasks.create_task(manager.outbox.run()),
                tasks.create_task(manager.listing.run()),
                tasks.create_task(manager.exposing.run()),
            ]
            if broker is not None:
                _with_broker(broker, manager, tasks, running)
                running.append(tasks.create_task(await _missing(manager, stack)))
            if await _unless(stop, manager.outbox.connected()):
                await manager.inbox.open()
                log.info(
                    "ready", extra={"rest": "{}:{}".format(*settings.rest), "mqtt": "{}:{}".format(*settings.mqtt)}
                )
            await stop.wait()
            await site.cleanup()
            await manager.inbox.close()
            manager.leaving.stop()
            for task in running:
                task.cancel()
    return 0


async def _opened(manager: Manager, broker: Broker | None, stop: asyncio.Event) -> bool:
    """Opens the state; whether it was, before the stop. Raises UnavailableError, BrokerError."""
    async with asyncio.TaskGroup() as tasks:
        watch = None if broker is None else tasks.create_task(broker.watch())
        try:
            return await _unless(stop, _open(manager))
        finally:
            if watch is not None:
                watch.cancel()


async def _open(manager: Manager) -> None:
    """Opens the state. A broker that is one of several has none until most of them are there, which is waited for."""
    while True:
        try:
            await manager.store.open()
            await manager.inbox.create()
        except UnavailableError as error:
            if not manager.settings.route:
                raise
            log.warning("the state is not there yet", extra={"error": error})
            await asyncio.sleep(QUORUM_S)
        else:
            return


async def _missing(manager: Manager, stack: AsyncExitStack) -> Coroutine[Any, Any, None]:
    """How nodes are found that went together with their broker."""
    if not manager.settings.route:
        return manager.roll_call()
    return manager.presence(await _connected(manager.settings, stack, SYSTEM)).run()


async def _unless(stop: asyncio.Event, wanted: Coroutine[Any, Any, None]) -> bool:
    """Waits for something, or for the stop; whether it came. Raises what it raises."""
    task, stopped = asyncio.create_task(wanted), asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        task.result()
    task.cancel()
    return not stop.is_set()


def _stopped_by_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _embedded(settings: Settings, stack: AsyncExitStack) -> Broker:
    broker = Broker(settings.broker_settings)
    stack.push_async_callback(broker.stop)
    await broker.start()
    return broker


def _with_broker(broker: Broker, manager: Manager, tasks: asyncio.TaskGroup, running: list[asyncio.Task[Any]]) -> None:
    """Watches our broker, with a roll call after each of its starts."""

    async def started() -> None:
        if not manager.settings.route:
            running.append(tasks.create_task(manager.roll_call()))

    def reload() -> None:
        try:
            broker.reload(manager.settings.broker_settings)
        except PkiError as error:
            log.error("reload refused, the old users stay", extra={"error": str(error)})

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    broker.started = started
    running.append(tasks.create_task(broker.watch()))


async def run_broker(settings: Settings) -> int:
    """Runs only the broker, for managers that are told its URL, until SIGTERM or SIGINT. Raises BrokerError."""
    stop = _stopped_by_signals()
    async with AsyncExitStack() as stack:
        broker = await _embedded(settings, stack)
        watch = asyncio.create_task(broker.watch())
        log.info("ready", extra={"url": settings.broker_settings.url, "mqtt": "{}:{}".format(*settings.mqtt)})
        await asyncio.wait((watch, asyncio.create_task(stop.wait())), return_when=asyncio.FIRST_COMPLETED)
        watch.cancel()
    return 0


async def _connected(settings: Settings, stack: AsyncExitStack, user: str = MANAGER) -> Client:
    """A client that connects again for ever. Raises UnavailableError if the first time takes CONNECT_S."""
    url = settings.broker or settings.broker_settings.url
    end = time.monotonic() + CONNECT_S
    while True:
        try:
            client = await _connect(url, settings.credentials(), user)
        except (OSError, NatsError, TimeoutError) as error:
            if time.monotonic() > end:
                raise UnavailableError(f"{url}: expected a NATS server: {error!r}") from error
            await asyncio.sleep(RECONNECT_S)
        else:
            stack.push_async_callback(client.close)
            return client


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """How a manager shows the broker's MQTT side who it is. Raises PkiError."""
    known = settings.credentials()
    if known is None:
        return None
    context = ssl.create_default_context(cafile=known.ca)
    context.load_cert_chain(known.manager.certificate, known.manager.key)
    return context


async def _connect(url: str, known: Pki | None, user: str) -> Client:
    return await nats.connect(
        url,
        user=None if known is None else user,
        password=None if known is None else known.password,
        name="cluster-manager",
        max_reconnect_attempts=-1,
        reconnect_time_wait=RECONNECT_S,
        error_cb=_note,
    )


async def _note(error: Exception) -> None:
    log.warning("broker connection", extra={"error": repr(error)})
