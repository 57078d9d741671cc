"""A node as a member of its cluster: what the supervisor uses.

Theory of operation
-------------------
*Owns* the session, the transport, and the files of what was known last, and joins them: events go to the session; its
commands go to the transport, to those who wait, and to the supervisor (``Feed``). All in one event loop, so nothing
is locked; only files are written in a thread (``Keeper``).

``on_tables`` is called with everything that is known when that has changed, and ``Tables.changed`` says what. Whoever
waits for an answer goes on after its entries were published.

Only ``subnetwork``, ``need`` and ``resolve`` wait for the cluster, the latter two at most ``cluster.query_timeout``
seconds. No other call does: what it announces is said at once, or on the connection's return.

Nothing that the broker sends ends a membership. A message that is wrong is counted, and logged with its field, at
most once in ``COMPLAINTS`` seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

from appliance.cluster import requests, topics
from appliance.cluster.access import access
from appliance.cluster.checks import Ranges, Subnetwork
from appliance.cluster.commands import Answered, Assigned, Changed, Command, Flush, NodesChanged, Publish, Refused
from appliance.cluster.errors import ClusterError
from appliance.cluster.feed import Feed, Tables
from appliance.cluster.keeper import Keeper
from appliance.cluster.messages import MessageError
from appliance.cluster.requests import Deployment, Endpoint
from appliance.cluster.session import Session, Times
from appliance.cluster.store import Kept, Store
from appliance.cluster.transport import Transport
from appliance.collector import Settling
from appliance.config import Config
from appliance.tables.layout import IPAddress
from appliance.tasks import end

log = logging.getLogger(__name__)

FAREWELL: Final = 2.0
"""Seconds that a stop waits for the broker to hear of it."""
COMPLAINTS: Final = 1.0
"""Seconds between two log lines about wrong messages."""
YOUNG_MAX: Final = 500
"""Jobs that the collector of cyclic garbage may know: it walks them in some 10 ms."""


class Member:
    """See the module. To be made and used within one running event loop.

    ``node_address`` and ``port`` are where peers send to. Raises ClusterError if the configuration cannot be used: then
    the appliance must not run, as it would do without what was configured.
    """

    def __init__(self, config: Config, node_address: IPAddress, port: int, on_tables: Callable[[Tables], None]) -> None:
        self._node = config.node.id
        if not self._node:
            raise ClusterError("node.id: expected 24 hexadecimal digits, as cluster.url names a cluster")
        self._access = access(config.cluster)
        self._loop = asyncio.get_running_loop()
        self._ranges = Ranges(config.network.overlay, config.network.services)
        times = Times(config.cluster.query_timeout, config.cluster.interest, config.cluster.refresh)
        self._session = Session(self._node, Endpoint(node_address, port), times, self._ranges)
        self._transport = Transport(self._node, self._access, self._will(), self)
        self._feed = Feed(self._session.jobs, on_tables, self._session.nodes)
        self._store = Store(config.paths.state, self._node)
        self._keeper = Keeper(self._store, self._session.answers.values, self._session.nodes)
        self._waiting: dict[str, asyncio.Future[bool]] = {}
        self._assigned: asyncio.Future[Subnetwork] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._online = False
        self._since = self._loop.time()
        self._last_error = ""
        self._silent_until = self._since
        self._settling = Settling(YOUNG_MAX)
        self._most = 0

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Makes what was known last the tables' content, and connects; the cluster need not be there."""
        self._restore(await asyncio.to_thread(self._store.load, self._complain))
        self._spawn("transport", self._transport.run())
        self._spawn("keeper", self._keeper.run())

    async def stop(self) -> None:
        """Says goodbye, keeps what is known, and disconnects."""
        self._do(self._session.stopping(self._now()))
        await self._transport.flush(FAREWELL)
        await self.release()

    def hold_connection(self, hold: Callable[[int | None], None]) -> None:
        """Has somebody keep each connection (``Transport.hold``)."""
        self._transport.hold = hold

    async def release(self) -> None:
        """Keeps what is known, and disconnects without a goodbye: the node goes on, and another process speaks for it
        soon."""
        await end(self._tasks)
        await self._keeper.flush()
        self._feed.flush()
        if self._timer is not None:
            self._timer.cancel()
        for key in list(self._waiting):
            self._settle(key, found=False)

    # --- what the supervisor wants ---------------------------------------------------------------------------------

    def serve(self) -> None:
        """The node carries packets from now on: instances that run here are announced, those that do already too."""
        self._do(self._session.serve(self._now()))

    async def subnetwork(self) -> Subnetwork:
        """The node's subnets: those that an earlier process was given, else those that the cluster gives now."""
        if not self._assigned.done():
            self._do(self._session.ask_subnetwork(self._now()))
        return await asyncio.shield(self._assigned)

    @property
    def kept_subnetwork(self) -> Subnetwork | None:
        """The node's subnets as far as they are known already, without asking."""
        return self._assigned.result() if self._assigned.done() else None

    async def deployed(self, job: str, number: int, v4: IPv4Address | None, v6: IPv6Address | None) -> None:
        """An instance runs here. Raises MessageError if the job's name has not four parts."""
        self._do(self._session.deploy(Deployment(job, number, v4, v6), self._now()))

    async def undeployed(self, job: str, number: int) -> None:
        """An instance runs here no more; nothing if it did not."""
        self._do(self._session.undeploy(job, number, self._now()))

    async def need(self, job: str) -> bool:
        """Something here needs a job: whether there are instances, all of which are known now.

        Raises MessageError if its name has not four parts.
        """
        return await self._answer(job, lambda: self._session.need(job, self._now()))

    async def resolve(self, address: IPAddress) -> bool:
        """A packet to an unknown address: whether the tables have it now."""
        return await self._answer(str(address), lambda: self._session.resolve(address, self._now()))

    def checked(self, job: str, number: int, *, is_good: bool) -> None:
        """Whether an instance that runs here works."""
        self._do(self._session.check(job, number, self._now(), is_good=is_good))

    def used(self, job: str) -> None:
        """Packets to a job were seen."""
        self._session.use(job, self._now())

    async def address_changed(self, new_address: IPAddress, port: int) -> None:
        """Peers reach this node elsewhere from now on."""
        self._do(self._session.move(Endpoint(new_address, port), self._now()))

    def uplink_changed(self) -> None:
        """Addresses of this node may be gone: a connection from one of them is made anew."""
        if self._transport.renew_if_stranded():
            self._session.counters["stranded"] += 1

    def status(self) -> dict[str, Any]:
        """What operators see. Times are seconds ago, or seconds long."""
        now = self._now()
        return {
            "broker": self._transport.broker,
            "node": self._node,
            "connected": self._online,
            "since": round(now - self._since, 3),
            "last_error": self._last_error,
            "staleness": round(self._session.staleness(now), 3),
            "jobs": len(self._session.jobs),
            "nodes": len(self._session.nodes),
            "instances": sum(len(job.instances) for job in self._session.jobs.values()),
            "interests": [self._interest(job, now) for job in sorted(self._session.interests)],
            "counters": {
                **self._session.counters,
                "saves_failed": self._keeper.failures,
                "tables_refused": self._feed.failures,
            },
        }

    def _interest(self, job: str, now: float) -> dict[str, Any]:
        interest = self._session.interests[job]
        stale = 0.0 if interest.stale_since is None else now - interest.stale_since
        return {"job": job, "unused": round(now - interest.used_at, 3), "stale": round(stale, 3)}

    # --- what the transport reports --------------------------------------------------------------------------------

    def connected(self) -> None:
        """A new connection is there."""
        self._turn(online=True)
        self._session.counters["connections"] += 1
        log.info("connected", extra={"broker": self._transport.broker})
        self._do(self._session.connected(self._now()))

    def disconnected(self, reason: str) -> None:
        """The connection is lost, or an attempt failed."""
        if self._online or self._last_error != reason:
            log.warning("no connection to the broker", extra={"broker": self._transport.broker, "error": reason})
        self._last_error = reason
        if self._online:
            self._turn(online=False)
            self._do(self._session.disconnected(self._now()))

    def received(self, topic: str, payload: bytes) -> None:
        """A message arrived."""
        try:
            self._do(self._session.received(topic, payload, self._now()))
        except Exception:  # a mistake of ours about one message must not cost all the others
            self._session.counters["failed"] += 1
            log.exception("message not understood", extra={"topic": topic})

    def delivered(self, publish: Publish) -> None:
        """The broker acknowledged a message."""
        self._session.delivered(publish)

    def refused(self, topic: str) -> None:
        """The broker does not let this node subscribe to a topic."""
        self._session.counters["subscriptions_refused"] += 1
        self._complain(f"{topic}: the broker refuses this node's subscription")

    # --- in common -------------------------------------------------------------------------------------------------

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Changed(jobs):
                    self._feed.change(jobs)
                    self._keeper.change()
                    self._grow(len(self._session.jobs))
                case NodesChanged(nodes):
                    self._feed.change_nodes(nodes)
                    self._keeper.change()
                case Flush():
                    self._feed.flush()
                case Answered(key, found):
                    self._settle(key, found)
                case Assigned(subnetwork):
                    self._assign(subnetwork)
                case Refused(topic, reason):
                    self._complain(f"{topic}: {reason}")
                case _:
                    self._transport.send(command)
        self._set_timer()

    def _grow(self, jobs: int) -> None:
        """What is known is more than ever: it comes to stay."""
        self._settling.came(max(0, jobs - self._most))
        self._most = max(self._most, jobs)

    async def _answer(self, key: str, ask: Callable[[], list[Command]]) -> bool:
        """The answer about a key, which all who wait for it share."""
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = self._loop.create_future()
        try:
            self._do(ask())
        except MessageError:
            self._waiting.pop(key, None)
            raise
        return await asyncio.shield(waiting)

    def _settle(self, key: str, found: bool) -> None:
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            self._feed.then(lambda: None if waiting.done() else waiting.set_result(found))

    def _assign(self, subnetwork: Subnetwork) -> None:
        if not self._assigned.done():
            self._assigned.set_result(subnetwork)
            self._spawn("subnetwork", self._keeper.attempt(lambda: self._store.save_subnetwork(subnetwork)))

    def _restore(self, kept: Kept) -> None:
        now = self._now()
        if kept.subnetwork is not None:
            try:
                subnetwork = self._ranges.subnetwork(kept.subnetwork)
            except MessageError as error:
                self._complain(f"the subnets kept for this node do not fit the configuration any more: {error}")
            else:
                self._assigned.set_result(subnetwork)
        self._do(self._session.restore(kept.results, now - kept.age, now, kept.nodes))
        self._feed.flush()

    def _set_timer(self) -> None:
        """Has the session called when it wants to be, at the latest."""
        deadline = self._session.deadline()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._do(self._session.tick(self._now()))

    def _turn(self, *, online: bool) -> None:
        self._online = online
        self._since = self._now()
        if online:
            self._last_error = ""

    def _complain(self, what: str) -> None:
        self._last_error = what
        if self._now() >= self._silent_until:
            self._silent_until = self._now() + COMPLAINTS
            log.warning("refused", extra={"error": what})

    def _will(self) -> Publish:
        kind, payload = requests.status(None)
        return Publish(topics.of_node(self._node, kind), payload, retain=True)

    def _spawn(self, name: str, work: Any) -> None:
        task = asyncio.create_task(work, name=f"cluster {name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._last_error = f"{task.get_name()} ended: {error}"
            log.error("ended", extra={"task": task.get_name()}, exc_info=error)

    def _now(self) -> float:
        return self._loop.time()
