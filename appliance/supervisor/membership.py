"""The node as a member of its cluster, from the supervisor's side.

Theory of operation
-------------------
*Owns* the ``Member`` of the moment, what was announced through it, the wait for subnets, the misses and the search for
used jobs. *Runs* in the supervisor's event loop.

The cluster is joined by the configuration (``node.id`` and ``cluster.url``), by a registration that an earlier process
was given, or by one that a NodeEngine gives now (``register``). What was known last is in force before the broker is
reached.

**Subnets.** If the configuration has any, these are the node's, and the cluster is not asked. Otherwise those kept on
disk count at once, and else the cluster's when it gives them: ``provisioned`` says that containers can be attached.
The environment is then made as it should be; if that fails it is tried again every ``RETRY_S`` seconds.

**Instances.** What is attached is announced, what is no more is withdrawn (``reconcile``); both are compared, never
assumed, so containers that were adopted at the start are announced, and those that a reboot took are not. What is being
taken off its link is withdrawn first (``leaving``): the others choose elsewhere by the time that the link is gone.

**Use.** An interest ends if nothing uses it (``cluster.interest``). Every ``scan_pause`` the flow records of all
workers are looked through in a thread, and the jobs whose addresses live flows have are reported as used.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

from appliance.cluster.checks import Subnetwork, check_job
from appliance.cluster.feed import Tables
from appliance.cluster.member import Member
from appliance.cluster.requests import Endpoint
from appliance.config import Config
from appliance.environment.addresses import IPNetwork, gateway_of
from appliance.environment.attachment import Attachment
from appliance.environment.errors import EnvironmentError_
from appliance.environment.manager import EnvironmentManager
from appliance.observe.usage import addresses_in_use
from appliance.supervisor import identity as identities
from appliance.supervisor.errors import NotReadyError, RegistrationError
from appliance.supervisor.identity import Identity
from appliance.supervisor.misses import Misses
from appliance.supervisor.peers import Peers
from appliance.supervisor.publication import Publication
from appliance.supervisor.workers import WorkerPool
from appliance.tables.layout import IPAddress
from appliance.tasks import end

log = logging.getLogger(__name__)

RETRY_S: Final = 5.0
SCAN_S: Final = 2.0
"""Seconds between two looks at the flows, where ``cluster.interest`` allows it."""
REGISTER_S: Final = 8.0
"""Seconds that a registration waits for the subnets: a NodeEngine gives up after 10."""


SetGateways = Callable[[Iterable[IPAddress]], None]
"""Takes the node's own addresses inside the overlay."""


def scan_pause(interest: int) -> float:
    """Seconds between two looks: several within the life of an interest."""
    return min(SCAN_S, interest / 4)


class Membership:
    """See the module. ``here`` is where the other nodes reach this one."""

    def __init__(
        self,
        config: Config,
        here: Endpoint,
        environment: EnvironmentManager,
        publication: Publication,
        pool: WorkerPool,
        peers: Peers,
        set_gateways: SetGateways,
    ) -> None:
        self.identity: Identity | None = None
        self.member: Member | None = None
        self.provisioned = asyncio.Event()
        self.misses = Misses(self._resolve, pool.answered)
        self.last_error = ""
        pool.on_miss = self.misses.missed
        self._config = config
        self._here = here
        self._environment = environment
        self._publication = publication
        self._pool = pool
        self._peers = peers
        self._set_gateways = set_gateways
        self._is_remembered = False
        self._is_serving = False
        self._announced: dict[tuple[str, int], Attachment] = {}
        self._leaving: set[tuple[str, int]] = set()
        self._joining = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Joins if there is a cluster to join. Subnets that are known are in force when this returns.

        Raises ClusterError or EnvironmentError_.
        """
        if self._environment.subnets:
            await self._provision(self._environment.subnets)
        identity = identities.configured(self._config)
        if identity is None and (identity := identities.remembered(self._config)) is not None:
            self._is_remembered = True
        if identity is not None:
            await self._join(identity, self._config_of(identity, "configuration"))

    async def register(self, identity: Identity) -> None:
        """A NodeEngine says who this node is; returns when containers can be attached.

        Raises RegistrationError if it is another node already, ConfigError or ClusterError if it cannot be that one,
        NotReadyError if the subnets do not come in time: they are waited for nevertheless.
        """
        async with self._joining:
            await self._register(identity)
        try:
            await asyncio.wait_for(self.provisioned.wait(), REGISTER_S)
        except TimeoutError:
            raise NotReadyError(self.why_not_ready()) from None

    def serve(self) -> None:
        """The node carries packets from now on: what runs here is announced. Whoever hears of an instance calls it."""
        self._is_serving = True
        if self.member is not None:
            self.member.serve()

    async def stop(self) -> None:
        """Says goodbye to the cluster."""
        await self.misses.stop()
        await self._leave()

    async def release(self) -> None:
        """Leaves the membership to the next supervisor."""
        await self.misses.stop()
        await self._end_tasks()
        if self.member is not None:
            await self.member.release()

    async def _register(self, identity: Identity) -> None:
        if self.identity is not None and self.identity.node != identity.node:
            if not self._is_remembered:
                raise RegistrationError(f"client_id: expected {self._node()}, which this node is already")
            await self._give_way()
        if self.identity is None:
            await self._join(identity, self._config_of(identity, "registration"))
            await asyncio.to_thread(identities.remember, self._config.paths.state, identity)
        self._is_remembered = False

    def _config_of(self, identity: Identity, source: str) -> Config:
        if self._config.node.id not in ("", identity.node):
            raise RegistrationError(f"client_id: expected node.id of the configuration, {self._config.node.id}")
        return identity.configure(self._config, source)

    async def _join(self, identity: Identity, config: Config) -> None:
        member = Member(config, self._here.address, self._here.port, self._on_tables)
        member.hold_connection(self._pool.keep_connection)
        self.member, self.identity = member, identity
        await member.start()
        if self._is_serving:
            member.serve()
        log.info("member of a cluster", extra={"node": identity.node, "broker": member.status()["broker"]})
        kept = member.kept_subnetwork
        if not self._environment.subnets and kept is not None:
            await self._provision(subnets_of(kept))
        elif not self._environment.subnets:
            self._spawn("subnets", self._await_subnets(member))
        await self.reconcile()
        self._spawn("used jobs", self._report_use(member, scan_pause(config.cluster.interest)))

    async def _give_way(self) -> None:
        """A remembered identity ends, as there is a newer one; its subnets with it, so nothing may have addresses."""
        if not self._config_has_subnets():
            try:
                await self._environment.assign(())
            except EnvironmentError_ as error:
                raise RegistrationError(f"client_id: expected {self._node()}, as it still has containers") from error
            self.provisioned.clear()
        await self._leave()
        self._publication.forget_cluster()
        self._peers.forget_cluster()
        self.identity = None

    async def _end_tasks(self) -> None:
        await end(self._tasks)

    async def _leave(self) -> None:
        await self._end_tasks()
        self._announced.clear()
        if self.member is not None:
            await self.member.stop()
            self.member = None

    def _node(self) -> str:
        return "" if self.identity is None else self.identity.node

    def _config_has_subnets(self) -> bool:
        return bool(self._config.network.subnet_v4 or self._config.network.subnet_v6)

    # --- subnets ---------------------------------------------------------------------------------------------------

    async def _provision(self, subnets: tuple[IPNetwork, ...]) -> None:
        """Puts the node's subnets into force. Raises EnvironmentError_."""
        await self._environment.assign(subnets)
        self._set_gateways(gateway_of(subnet).ip for subnet in subnets)
        await self._environment.converge()
        await self.reconcile()
        self.provisioned.set()

    async def _await_subnets(self, member: Member) -> None:
        subnets = subnets_of(await member.subnetwork())
        log.info("subnets", extra={"subnets": [str(subnet) for subnet in subnets]})
        while not self.provisioned.is_set():
            try:
                await self._provision(subnets)
            except EnvironmentError_ as error:
                self.last_error = f"subnets: {error}"
                log.error("the subnets cannot be put into force", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)

    def why_not_ready(self) -> str:
        """Why containers cannot be attached."""
        if self.last_error:
            return self.last_error
        if self.member is None:
            return "network.subnet_v4, network.subnet_v6: expected a subnet, or a cluster that gives one"
        status = self.member.status()
        reason = "it has not answered" if status["connected"] else status["last_error"] or "it is not reached yet"
        return f"subnets: expected an answer of the cluster at {status['broker']}: {reason}"

    # --- what runs here --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def leaving(self, service: str, instance: int) -> AsyncIterator[None]:
        """Within the block an instance is taken off its link: it is withdrawn before, so that the cluster tells the
        others meanwhile. If it stays after all it is announced again."""
        self._leaving.add((service, instance))
        try:
            await self.reconcile()
            yield
        finally:
            self._leaving.discard((service, instance))
            await self.reconcile()

    async def reconcile(self) -> None:
        """Announces what is attached and was not, and withdraws what was and is not any more. Does not wait."""
        if self.member is None:
            return
        attached = {(it.service, it.instance): it for it in self._environment.attachments()}
        for key in self._leaving:
            attached.pop(key, None)
        for key in self._announced.keys() - attached.keys():
            del self._announced[key]
            await self.member.undeployed(*key)
        for key, attachment in attached.items():
            announced = self._announced.get(key)
            if announced is None or announced.addresses != attachment.addresses:
                await self.member.deployed(*key, attachment.address_v4, attachment.address_v6)
                self._announced[key] = attachment

    def checked(self, job: str, number: int, is_good: bool) -> Member | None:
        """An instance here works, or does not; gives who passes that on."""
        if self.member is not None:
            self.member.checked(job, number, is_good=is_good)
        return self.member

    def uplink_changed(self) -> None:
        """Addresses of this node may be gone: a connection from one of them is made anew."""
        if self.member is not None:
            self.member.uplink_changed()

    async def move(self, here: Endpoint) -> None:
        """The node is reached elsewhere from now on: the cluster is told, and the tables are derived anew."""
        self._here = here
        if self.member is not None:
            await self.member.address_changed(here.address, here.port)
        self._publication.move(here)
        self._peers.move(here)

    # --- what is needed here ---------------------------------------------------------------------------------------

    async def need(self, job: str) -> bool:
        """Whether a job has instances, all of which are known now. Raises MessageError if that is no job's name."""
        check_job(job)
        if self.member is None or self._publication.is_static(job):
            return job in self._publication.jobs
        return await self.member.need(job)

    async def resolve(self, address: IPAddress) -> bool:
        """Whether the tables have an address now."""
        return self._publication.job_of(address) is not None or await self._resolve(address)

    async def _resolve(self, address: IPAddress) -> bool:
        return self.member is not None and await self.member.resolve(address)

    async def _report_use(self, member: Member, pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            records = [worker.records for worker in self._pool.workers]
            for job in self._jobs_of(await asyncio.to_thread(addresses_in_use, records, time.monotonic_ns())):
                member.used(job)

    def _jobs_of(self, addresses: list[IPAddress]) -> set[str]:
        jobs = {self._publication.job_of(address) for address in addresses}
        return {job for job in jobs if job is not None}

    # --- in common -------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What operators see."""
        return {
            "member": self.member is not None,
            "subnets": [str(subnet) for subnet in self._environment.subnets],
            "ready": self.provisioned.is_set(),
            **({} if self.member is None else self.member.status()),
            "misses": dict(self.misses.counters),
            "peers": self._peers.status(),
        }

    def _on_tables(self, tables: Tables) -> None:
        self._publication.update(tables)
        self._peers.update(tables.nodes, tables.changed_nodes)

    def _spawn(self, name: str, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(name, task))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.last_error = f"{name}: {error}"
            log.error("ended", extra={"task": name}, exc_info=error)


def subnets_of(subnetwork: Subnetwork) -> tuple[IPNetwork, ...]:
    """The subnets of an answer."""
    return tuple(it for it in (subnetwork.v4, subnetwork.v6) if it is not None)
