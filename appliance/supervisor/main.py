"""The supervisor's life: make the node, keep it, take it down.

Start, in this order, so that nothing is reachable before it works: configuration, TUN queues, probes, sockets and
steering, tables with the file's and the cluster's last known jobs, bridge and routes, template and workers, API. Stop
is the reverse. Whatever fails at start undoes what came before it, and the reason is one line.

Nothing of this waits for the cluster. A node that has no subnets yet runs without a bridge until they come
(``membership``); the API says meanwhile why nothing can be attached.

What others do to the node is noticed and answered from the first look at the kernel on (``upkeep``):
``attachment_gone`` if a container went away by itself, ``uplink_changed`` if the underlay's links, addresses or routes
changed. ``listeners`` are called with all jobs after each change of the tables.

SIGTERM and SIGINT stop, SIGHUP reloads (``reload``), SIGUSR2 ends the supervisor alone: systemd's way to restart it.

A supervisor that finds what another one left goes on with it (``estate``): queues, sockets, tables, flows, and the
workers that run. ``restart`` is that on purpose: everything is left as it is, and the process executes itself anew,
which is how another version takes over. The process keeps its number, so whoever watches it notices nothing.
"""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import wraps
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import uvloop

from appliance import config as configuration
from appliance import privileges
from appliance.cluster.checks import check_job
from appliance.cluster.errors import ClusterError
from appliance.cluster.feed import Tables
from appliance.cluster.messages import MessageError, read_results
from appliance.cluster.requests import Endpoint
from appliance.config import Config
from appliance.dataplane import cache
from appliance.environment.attachment import Attachment, NetnsRef
from appliance.environment.errors import EnvironmentError_
from appliance.environment.manager import EnvironmentManager
from appliance.environment.portmap import PortMapping
from appliance.environment.tun import TunDevice
from appliance.observe.log import configure
from appliance.privileges import PrivilegeError
from appliance.supervisor import estate, inheritance, probe, record
from appliance.supervisor.errors import NotReadyError, StartError
from appliance.supervisor.estate import Estate, Step
from appliance.supervisor.notify import Systemd, kept, kept_names
from appliance.tables import layout
from appliance.tables.layout import IPAddress
from appliance.tables.publish import TableFullError
from appliance.tasks import end

if TYPE_CHECKING:
    from appliance.supervisor.naming import Naming
    from appliance.supervisor.publication import Listener

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


Method = Callable[Concatenate["Supervisor", P], Coroutine[Any, Any, R]]


def counted(operation: str) -> Callable[[Method[P, R]], Method[P, R]]:
    """Counts how often an operation of the supervisor was done, and how often it was refused."""

    def decorate(method: Method[P, R]) -> Method[P, R]:
        @wraps(method)
        async def call(self: Supervisor, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                result = await method(self, *args, **kwargs)
            except Exception:
                self.operations[operation, "refused"] += 1
                raise
            self.operations[operation, "ok"] += 1
            return result

        return call

    return decorate


@dataclass(frozen=True)
class Offload:
    """One offload: what the configuration wants and what this kernel gives."""

    wanted: bool
    works: bool
    reason: str = ""

    @property
    def on(self) -> bool:
        """Whether it is used."""
        return self.wanted and self.works

    def reply(self) -> dict[str, bool | str]:
        """As the local API reports it."""
        return {"wanted": self.wanted, "on": self.on, "reason": self.reason}


def uplink_address(config: Config) -> IPAddress:
    """The underlay address that peers send to. Raises StartError if it cannot be found out."""
    if config.node.address != "auto":
        return config.node.address
    for family, outside in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect((outside, 9))  # sends nothing: asks the routing table for a source address
            except OSError:
                continue
            return ip_address(sock.getsockname()[0])
    raise StartError("node.address: expected an address, as no default route tells one")


class Supervisor:
    """One node's appliance."""

    def __init__(self, config: Config, path: Path) -> None:
        self.config = config
        self.path = path
        self.address = uplink_address(config)
        self.port = config.tunnel.advertised_port or config.tunnel.port
        self.offloads: dict[str, Offload] = {}
        self.environment = EnvironmentManager(config)
        self.listeners: list[Listener] = []
        self.naming: Naming | None = None
        self.last_error = ""
        self.reload_error = ""
        self.reloaded_at = time.time()
        self.operations: Counter[tuple[str, str]] = Counter()
        self.leaving = asyncio.Event()
        self.again = False
        self.started = round(time.time(), 3)
        """Of this process, or of the last restart: seconds since 1970, for people and for telling two apart."""
        self.systemd = Systemd()
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Bring the node up. Raises StartError, OSError or what the environment raises; then nothing is left behind,
        and what was there before goes on."""
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        self._make_directories()
        workers = len(self._cpus())
        left, step = self._left(workers)
        self._goes_on = left is not None
        self.record = record.Record(self.config.paths.runtime)
        self.record.put(record.SUPERVISOR, os.getpid())
        self._open_pool(workers, left)
        await self._open_tables(left)
        await self._make_parts()
        await self._join()
        await self._run_workers(left, step)
        await self._serve()
        self._goes_on = False
        log.info("ready", extra={"address": str(self.address), "workers": workers})

    def _cpus(self) -> Sequence[int]:
        from appliance.supervisor.workers import cpus_of

        return cpus_of(self.config)

    def _open_pool(self, workers: int, left: Estate | None) -> None:
        """Queues, sockets and the workers' memory: what was left, or new."""
        from appliance.supervisor.workers import WorkerPool

        tun = self._open_tun(workers, left)
        sockets = self._open_sockets(workers, left)
        self.pool = WorkerPool(self.config, tun, sockets, left, self.systemd, self.record.put)
        self._stack.callback(self.pool.close)
        self.pool.adopt()

    async def _open_tables(self, left: Estate | None) -> None:
        """The shared tables, and what is written into them."""
        from appliance.supervisor.warm import compile_publisher
        from appliance.tables.catalogue import Catalogue
        from appliance.tables.publish import Publisher

        await asyncio.to_thread(compile_publisher)
        try:
            tables = None if left is None else left.take("tables")
            self.publisher = Publisher(self._capacity(), self.pool.announced, tables)
        except ValueError as error:
            raise StartError(f"the tables that were left cannot be used: {error}; {estate.HOW_TO_END}") from error
        self._stack.callback(self.publisher.close)
        await inheritance.quiet(self.publisher, self.pool)
        self.publisher.set_ranges(self.config.network.services, self.config.network.overlay)
        self.catalogue = Catalogue(self.publisher)

    async def _make_parts(self) -> None:
        """Who decides what the tables have."""
        from appliance.supervisor.membership import Membership
        from appliance.supervisor.peers import Peers
        from appliance.supervisor.ports import Ports
        from appliance.supervisor.prober import Prober
        from appliance.supervisor.publication import Publication

        here = Endpoint(self.address, self.port)
        self.peers = Peers(self.catalogue, here)
        self.pool.on_too_big = self.peers.too_big
        self.publication = Publication(self.catalogue, here)
        self.publication.listeners = self.listeners
        self.prober = Prober(self.publication.rearrange)
        self.publication.arrange = self.prober.arrange
        await self.prober.start()
        self._stack.callback(self.prober.close)
        self.ports = Ports(self.config, self.environment)
        self.membership = Membership(
            self.config, here, self.environment, self.publication, self.pool, self.peers, self._set_gateways
        )

    async def _join(self) -> None:
        """The node becomes a member, and follows what changes on this host."""
        from appliance.supervisor.upkeep import Upkeep

        self._stack.push_async_callback(self.environment.close)
        self._stack.push_async_callback(self._end_pool)
        self._stack.push_async_callback(self.membership.stop)
        self._apply_tables()
        await self.membership.start()
        await self.peers.start()
        self._stack.push_async_callback(self.peers.stop)
        self.upkeep = Upkeep(self.environment, self.attachment_gone, self.uplink_changed)
        self._stack.push_async_callback(self.upkeep.stop)
        await self.upkeep.start()

    async def _run_workers(self, left: Estate | None, step: Step) -> None:
        await self.pool.start(
            self.publisher,
            udp_gso=self.offloads["udp_gso"].on,
            coalesce=self.offloads["coalesce"].on,
            renew=step is Step.RENEW,
        )
        self.membership.serve()
        self._stack.push_async_callback(self.ports.stop)
        await self.ports.start()  # not before: instances are announced by now, and called
        if left is not None:
            left.close()
            settling = asyncio.ensure_future(inheritance.settle(self.catalogue, self.membership, self.pool))
            self._stack.callback(settling.cancel)

    async def _serve(self) -> None:
        """Names, exposed services, the API, and what watches over all of it."""
        from appliance.supervisor import monitor
        from appliance.supervisor.api import serve

        self._start_naming()
        self._start_ingress()
        self._start_flow_log()
        self._close_api = await serve(self)
        self._stack.push_async_callback(self._close_api)
        self._stack.push_async_callback(await monitor.serve(self))

    async def _end_pool(self) -> None:
        """A supervisor that could not go on with what there was leaves it to one that can."""
        await (self.pool.release() if self._goes_on else self.pool.stop())

    def _left(self, workers: int) -> tuple[Estate | None, Step]:
        """What another supervisor left, as far as this one can go on with it. Raises StartError if it must not."""
        stored = kept(os.environ)  # type: ignore[arg-type]
        names = estate.storable(workers, self.config.tunnel.source_ports) | stored.keys()
        left = estate.found(self.config.paths.runtime, stored)
        if left is None:
            _end_orphans(self.config, (), has_template=False)  # one that knew nothing may have ended meanwhile
            self.systemd.forget(names)
            return None, Step.ANEW
        verdict = estate.decided(left, estate.manifest(self.config, workers, 0))
        if verdict.step is Step.ANEW:
            log.warning("beginning anew, flows end", extra={"reason": verdict.why})
            self.systemd.forget(names | left.held.keys())  # what it keeps open would go on taking packets
            left.dissolve()
            return None, Step.ANEW
        self._stack.callback(left.close)
        if verdict.step is Step.REFUSE:
            raise StartError(verdict.why)
        log.info("going on with what is there", extra={"step": verdict.step.value, "why": verdict.why})
        return left, verdict.step

    def _start_naming(self) -> None:
        from appliance.supervisor.naming import Naming, dismiss

        if not self.config.naming.enabled:
            dismiss(self.config.paths.runtime)
        else:
            self.naming = Naming(self.config, self.publication, self.membership, self.environment, self.pool.kill)
            self.naming.on_process = lambda pid: self.record.put(record.RESOLVER, pid)
            self._stack.push_async_callback(self.naming.stop)
            self.naming.start()

    def _start_ingress(self) -> None:
        from appliance.supervisor.health import Checks
        from appliance.supervisor.ingress import Ingress

        self.ingress = Ingress(self.environment, self.membership, self.publication, self.catalogue, self.ports)
        self.checks = Checks(self.config, self.environment, self.membership.checked)
        self.listeners += [self.ingress.changed, self.checks.changed]
        self._stack.push_async_callback(self.ingress.stop)
        self._stack.push_async_callback(self.checks.stop)
        self.ingress.start()
        self.checks.changed(Tables(self.publication.jobs, frozenset()))

    def _start_flow_log(self) -> None:
        from appliance.supervisor.flowlog import FlowLog

        name = self.config.node.id or str(self.address)
        self.flow_log = FlowLog(self.config.flowlog, self.pool.workers, self.catalogue, name)
        self._stack.push_async_callback(self.flow_log.stop)
        self.flow_log.start()

    def _make_directories(self) -> None:
        for directory in (self.config.paths.runtime, self.config.paths.state):
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                log.warning("cannot keep anything there", extra={"path": str(directory), "error": error.strerror})

    def _capacity(self) -> layout.Capacity:
        tables = self.config.tables
        return layout.Capacity(tables.hosts, tables.services, tables.backends, tables.maglev, tables.nodes)

    def _open_tun(self, workers: int, left: Estate | None) -> TunDevice:
        name = self.config.network.tun
        if left is None:
            tun = TunDevice(name, workers)
        else:
            tun = TunDevice.adopt(name, [left.take(f"{i}.tun") for i in range(workers)])
        self._stack.callback(tun.close)
        wanted = self.config.offload
        got = tun.set_offloads(tso=wanted.tun_tso, uso=wanted.tun_uso)
        refused = "the kernel refuses it (TUNSETOFFLOAD)"
        self.offloads["tun_tso"] = Offload(wanted.tun_tso, got.tso, "" if got.tso or not wanted.tun_tso else refused)
        self.offloads["tun_uso"] = Offload(wanted.tun_uso, got.uso, "" if got.uso or not wanted.tun_uso else refused)
        if workers > 1 and left is None:
            self._steer("TUN queues", workers, tun.steer, inbound=False)
        return tun

    def _open_sockets(self, workers: int, left: Estate | None) -> list[Any]:
        from appliance.supervisor import sockets as udp

        self._probe_udp()
        tunnel = self.config.tunnel
        if left is not None:
            return [udp.adopt(left.worker(i), tunnel.source_ports) for i in range(workers)]
        sockets = udp.open_all(
            workers, tunnel.port, tunnel.source_ports, tunnel.socket_buffer, gro=self.offloads["udp_gro"].on
        )
        if workers > 1:
            self._steer("tunnel sockets", workers, lambda fd: udp.steer(sockets, fd), inbound=True)
        return sockets

    def _probe_udp(self) -> None:
        wanted = self.config.offload
        for name, is_wanted, attempt in (
            ("udp_gso", wanted.udp_gso, probe.udp_gso),
            ("udp_gro", wanted.udp_gro, probe.udp_gro),
        ):
            result = attempt() if is_wanted else probe.Probe(False)
            self.offloads[name] = Offload(is_wanted, result.works, result.reason)
            if is_wanted and not result.works:
                log.warning("offload fails here, switched off", extra={"offload": name, "reason": result.reason})
        self.offloads["coalesce"] = Offload(wanted.coalesce, works=True)

    def _steer(self, what: str, workers: int, attach: Callable[[int], None], *, inbound: bool) -> None:
        """Load a steering program and attach it. Without it flows would meet in the wrong worker: refuse to start."""
        from appliance.dataplane import bpf, steering

        try:
            program = bpf.load(bpf.SOCKET_FILTER, steering.program(workers, inbound=inbound), "edge_steer")
            attach(program)
            os.close(program)
        except OSError as error:
            raise StartError(f"workers.count: expected 1, as this kernel cannot steer {what}: {error}") from error

    # --- containers ----------------------------------------------------------------------------------------------

    @counted("attach")
    async def attach(
        self,
        service: str,
        instance: int,
        netns: NetnsRef,
        ports: Sequence[PortMapping] = (),
        interface: str = "",
        addresses: Sequence[IPAddress] = (),
    ) -> Attachment:
        """Put a container on the bridge, with these ports of the node, and announce it. The arguments are those of
        ``EnvironmentManager.attach``.

        Raises MessageError, EnvironmentError_, or NotReadyError while the node has no subnets.
        """
        check_job(service)
        if not self.membership.provisioned.is_set():
            raise NotReadyError(self.membership.why_not_ready())
        attachment = await self._attach(service, instance, netns, ports, interface, addresses)
        await self.membership.reconcile()
        if self.naming is not None:
            await self.naming.attached(attachment)
        return attachment

    async def map_ports(self, attachment: Attachment, ports: Sequence[PortMapping]) -> None:
        """Have these ports of the node lead to an attached container, instead of those that did. Raises
        EnvironmentError_: then nothing has changed."""
        service, instance = attachment.service, attachment.instance
        before = await self.ports.reserve(service, instance, ports)
        try:
            await self.ports.put(attachment, before)
        except BaseException:
            await self.ports.drop(service, instance, before)
            raise

    async def _attach(
        self,
        service: str,
        instance: int,
        netns: NetnsRef,
        ports: Sequence[PortMapping],
        interface: str,
        addresses: Sequence[IPAddress],
    ) -> Attachment:
        """On the bridge with all its ports; or as before, or, where what was there is lost, gone for everybody."""
        before, known = await self.ports.reserve(service, instance, ports), self._known(service, instance)
        try:
            attachment = await self.environment.attach(service, instance, netns, interface, addresses)
            await self.ports.put(attachment, before)
        except BaseException:
            await self.ports.drop(service, instance, before)
            if not known:
                await self.environment.detach(service, instance)
            elif not self._known(service, instance):
                await self.attachment_gone(known[0])
            raise
        return attachment

    def _known(self, service: str, instance: int) -> list[Attachment]:
        return [it for it in self.environment.attachments() if (it.service, it.instance) == (service, instance)]

    def _set_gateways(self, addresses: Iterable[IPAddress]) -> None:
        """The node has these addresses on its bridge now."""
        self.publisher.set_gateways(addresses)
        self.ports.ask()

    async def attach_guest(
        self, service: str, instance: int, ports: Sequence[PortMapping] = ()
    ) -> tuple[Attachment, dict[str, str]]:
        """Make a namespace for a unikernel or virtual machine, put it on the bridge, and announce it; what its guest
        is to be told. If it fails nothing is left, except of what was attached before. Raises as ``attach`` does."""
        from appliance.environment import guest

        check_job(service)
        name, known = guest.namespace_name(service, instance), self._known(service, instance)
        try:
            attachment = await self.attach(service, instance, await guest.make_namespace(name), ports)
            return attachment, await guest.build(attachment, self.config.network.guest)
        except BaseException:
            if not known:
                await self.detach(service, instance)
            if not any(map(guest.is_guest, (*known, *self._known(service, instance)))):
                await guest.remove_namespace(name)
            raise

    async def detach_guest(self, service: str, instance: int) -> bool:
        """Take a unikernel or virtual machine off the bridge, and its namespace away; False if it was not on it, or is
        neither: then nothing is done.

        Raises MessageError or EnvironmentError_.
        """
        from appliance.environment import guest

        check_job(service)
        if not all(map(guest.is_guest, self._known(service, instance))):
            return False
        found = await self.detach(service, instance)
        await guest.remove_namespace(guest.namespace_name(service, instance))
        return found

    def told(self, attachment: Attachment) -> dict[str, Any]:
        """What a runtime is told of an attachment."""
        from appliance.naming.upstream import of_host
        from appliance.runtimes.told import dns, told

        names = dns(attachment, self.config.naming.zone, of_host()[1]) if self.config.naming.enabled else {}
        return told(attachment, self.environment.wanted, self.environment.subnets, names)

    @counted("detach")
    async def detach(self, service: str, instance: int, netns: NetnsRef | None = None) -> bool:
        """Say that a container goes, and take it off the bridge; False if it was not on it, or is in another namespace
        than this.

        Raises EnvironmentError_: then it is still there, and announced again.
        """
        known = [it for it in self._known(service, instance) if netns in (None, it.netns)]
        async with self.membership.leaving(service, instance) if known else nullcontext():
            if known or netns is None:
                await self.ports.drop(service, instance)
            found = await self.environment.detach(service, instance, netns)
        if self.naming is not None and found:
            for attachment in known:
                await self.naming.detached(attachment)
        return found

    async def attachment_gone(self, attachment: Attachment) -> None:
        """A container's link or namespace is gone: forget it, and say so. Nothing if it is there after all."""
        await self.environment.forget(attachment.service, attachment.instance)
        if not self._known(attachment.service, attachment.instance):
            await self.ports.drop(attachment.service, attachment.instance)
        await self.membership.reconcile()
        if self.naming is not None:
            await self.naming.detached(attachment)

    async def uplink_changed(self) -> None:
        """Links, addresses or routes of the underlay changed: paths may have other MTUs, the connection to the cluster
        may be one that nothing passes any more, and if peers reach this node elsewhere now they are told."""
        self.peers.recheck()
        self.membership.uplink_changed()
        try:
            address = uplink_address(self.config)
        except StartError as error:
            log.warning("no way to the other nodes, the last address stays", extra={"error": str(error)})
            return
        if address != self.address:
            log.info("uplink address", extra={"old": str(self.address), "new": str(address)})
            self.address = address
            await self._move(address)

    async def _move(self, address: IPAddress) -> None:
        try:
            await self.membership.move(Endpoint(address, self.port))
        except TableFullError as error:
            self.last_error = f"uplink: {error}"
            log.error("tables refused, what fits is in force", extra={"error": str(error)})

    # --- tables --------------------------------------------------------------------------------------------------

    def _apply_tables(self) -> list[str]:
        """Make the static tables those in force; gives what changed. Raises MessageError or TableFullError."""
        path = self.config.tables.static
        return self.publication.replace_static(read_results(Path(path)) if path else ()).changed

    @counted("reload")
    async def reload(self) -> list[str]:
        """Read the configuration and the static tables again; gives what changed. A wrong file changes nothing.

        Raises ConfigError, MessageError, StartError or TableFullError.
        """
        from appliance.supervisor.flowlog import opened

        try:
            fresh = configuration.load(self.path)
            differences = configuration.differences(self.config, fresh)
            _check_reloadable(differences)
            output = opened(fresh.flowlog)
            previous, self.config = self.config, fresh
            try:
                changed = self._apply_tables()
            except Exception:
                self.config = previous
                output.close()
                raise
        except Exception as error:
            self.last_error = f"reload: {error}"
            self.reload_error = str(error)
            raise
        configure(self.config.log.level)
        await self.ports.reconfigure(self.config)
        self.checks.reconfigure(self.config)
        await self.flow_log.reconfigure(self.config.flowlog, output)
        if self.naming is not None:
            self.naming.reconfigure(self.config)
        self.last_error, self.reload_error, self.reloaded_at = "", "", time.time()
        return [*(change.key for change in differences), *changed]

    async def stop(self) -> None:
        """Take everything down that ``start`` made."""
        await self._stack.aclose()

    def leave(self, *, again: bool) -> None:
        """End soon, and leave everything to the next supervisor; ``again``: which this process becomes."""
        self.again = again
        self.leaving.set()

    async def release(self) -> None:
        """Leave everything as it is to the next supervisor, and hold up nothing of it."""
        await self._close_api()
        if self.naming is not None:
            await self.naming.release()
        await self.ingress.stop()
        await self.checks.stop()
        await self.flow_log.stop()
        await self.upkeep.stop()
        await self.peers.stop()
        await self.ports.stop()
        await self.membership.release()
        await self.pool.release()
        await self.environment.close()
        self._stack.pop_all()


def _check_reloadable(differences: Iterable[configuration.Change]) -> None:
    fixed = [change.key for change in differences if not configuration.is_reloadable(change.key)]
    if fixed:
        raise StartError(f"{', '.join(fixed)}: expected the value in force, as a change needs a restart")


async def _serve(config: Config, path: Path) -> bool:
    supervisor = Supervisor(config, path)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _reap_inherited(loop)
    loop.add_signal_handler(signal.SIGUSR2, lambda: supervisor.leave(again=False))
    supervisor.systemd.start_watchdog()  # after a restart systemd listens for it already, and a start may take minutes
    starting = asyncio.ensure_future(supervisor.start())
    loop.add_signal_handler(signal.SIGHUP, lambda: asyncio.ensure_future(_reload(supervisor, starting)))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        await end({starting})
        return False
    await starting
    supervisor.systemd.say("READY=1")
    leaving = asyncio.ensure_future(supervisor.leaving.wait())
    await asyncio.wait({stopping, leaving}, return_when=asyncio.FIRST_COMPLETED)
    supervisor.systemd.stop_watchdog()
    if not stop.is_set():
        log.info("leaving everything to the next supervisor", extra={"again": supervisor.again})
        if supervisor.again:
            supervisor.systemd.reloading()
        await supervisor.release()
        return supervisor.again
    log.info("stopping")
    supervisor.systemd.say("STOPPING=1")
    await supervisor.stop()
    return False


def _reap_inherited(loop: asyncio.AbstractEventLoop) -> None:
    """Wait for the children that this process had before it executed itself anew: nobody else does."""
    for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        pidfd = os.pidfd_open(int(word))
        loop.add_reader(pidfd, _reap, loop, int(word), pidfd)


def _reap(loop: asyncio.AbstractEventLoop, pid: int, pidfd: int) -> None:
    loop.remove_reader(pidfd)
    os.close(pidfd)
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


async def _reload(supervisor: Supervisor, starting: asyncio.Future[None]) -> None:
    """Not before the start is done, of which each part has read the configuration at another moment."""
    await asyncio.wait({starting})
    if starting.cancelled() or starting.exception() is not None:
        return
    supervisor.systemd.reloading()
    try:
        log.info("reloaded", extra={"changed": await supervisor.reload()})
    except Exception as error:
        log.error("reload refused, the old configuration stays in force", extra={"error": str(error)})
    supervisor.systemd.say("READY=1")


def run(config: Config, path: Path) -> int:
    """Run the appliance until it is told to stop; gives the exit code."""
    configure(config.log.level)
    cache.use(config.paths.cache)
    try:
        stored = kept_names(os.environ)
        _end_orphans(config, stored if estate.MANIFEST in stored else ())
        _limit(config)
        if uvloop.run(_serve(config, path)):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except (
        StartError, ClusterError, MessageError, EnvironmentError_, TableFullError, PrivilegeError, OSError,
    ) as error:  # fmt: skip
        log.error("cannot run", extra={"error": str(error)})
        sys.stderr.write(f"appliance: {error}\n")
        return 1
    return 0


def _end_orphans(config: Config, stored: Collection[str], *, has_template: bool = True) -> None:
    """End workers that nobody can go on with: they would share queues with ours. ``stored``: what systemd kept;
    ``has_template``: one that lives keeps the rest. Raises OSError."""
    runtime = config.paths.runtime
    living = record.alive(runtime)
    if living.get(record.SUPERVISOR) == os.getpid():  # we were it, before we executed ourselves anew
        del living[record.SUPERVISOR]
    if not has_template:
        living.pop(record.TEMPLATE, None)
    for name in record.end(runtime, record.orphans(living, stored)):
        log.warning("ended, as nobody kept what it works with", extra={"part": name})


def _limit(config: Config) -> None:
    """Give up what the supervisor does not need, once the groups are those that it may give its sockets to.

    Raises OSError or StartError.
    """
    if config.api.group:
        try:
            os.setgroups([grp.getgrnam(config.api.group).gr_gid])
        except KeyError:
            raise StartError(f"api.group: expected a group of this system, got {config.api.group}") from None
    privileges.keep(privileges.SUPERVISOR, privileges.CHILDREN)
