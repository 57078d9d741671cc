"""The resolver, from the supervisor's side: started, fed, watched, replaced.

Theory of operation
-------------------
*Owns* the resolver's process and the supervisor's end of its stream. *Runs* in the supervisor's event loop.

It waits until the node has subnets, as its sockets are bound to the bridge's addresses; opens those, starts the
process, sends it everything that is known, and from then on what changes. The stream's buffer is never waited for:
while the resolver does not read, changes gather as a set of job names, and what they are is looked up when there is
room.

A resolver that ends is started again; if it did not live for `STABLE_S`, after a pause
that grows from `BACKOFF_S` to `BACKOFF_MAX_S`. One that still answers for a
supervisor that died is told to leave when the new one is ready (`CONTROL`, a unix socket in ``paths.runtime``). Until
then the new one is found beside it (`_beside`), so that a supervisor that ends meanwhile leaves both to be found.

What the resolver does not know it asks for (``need``): the cluster is asked once for a key, whoever waits, and the
answer is sent after the entries that it is about.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from appliance import privileges
from appliance.cluster.checks import is_address
from appliance.cluster.feed import Tables
from appliance.cluster.messages import MessageError
from appliance.config import Config
from appliance.config import Naming as NamingConfig
from appliance.environment.addresses import gateway_of
from appliance.environment.attachment import Attachment
from appliance.environment.manager import EnvironmentManager
from appliance.naming import channel, resolv, sockets
from appliance.naming.describe import describe
from appliance.naming.upstream import of_host
from appliance.naming.waiting import Verdict
from appliance.supervisor.errors import StartError
from appliance.supervisor.membership import Membership
from appliance.supervisor.publication import Publication
from appliance.tasks import end

log = logging.getLogger(__name__)

BACKOFF_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
STABLE_S: Final = 5.0
EXIT_S: Final = 2.0
REPLY_S: Final = 2.0
"""Seconds that an answer of the resolver to the supervisor is waited for."""
NEEDS_S: Final = 3.0
"""Seconds between two looks at what the instances here are going to call."""
CONTROL: Final = "resolver.sock"
LEAVE: Final = b"leave"
LEAVE_S: Final = 1.0
"""Seconds in which a resolver takes that; one that hangs has a full queue."""
READ: Final = 1 << 18


class Naming:
    """See the module."""

    def __init__(
        self,
        config: Config,
        publication: Publication,
        membership: Membership,
        environment: EnvironmentManager,
        kill: Callable[[int], None],
    ) -> None:
        """``kill`` ends the process of a pidfd, which is another user's."""
        self.restarts = -1
        self.last_error = ""
        self.ready = asyncio.Event()
        self._config = config
        self._publication = publication
        self._membership = membership
        self._environment = environment
        self._user = privileges.identity(config.naming.user, privileges.RESOLVER_UID, "naming.user")
        self._kill = kill
        self._stopping = False
        self.on_process: Callable[[int], None] = lambda _pid: None
        """Is told of each process."""
        self._stream: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._frames = channel.Frames()
        self._out = bytearray()
        self._changed: set[str] = set()
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._old: list[socket.socket] = []
        self._look = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        publication.listeners.append(self._on_tables)

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the resolver as soon as the bridge has addresses, and keeps it running."""
        self._spawn(self._keep())
        self._spawn(self._follow_needs())

    async def stop(self) -> None:
        """Stops the resolver."""
        self._stopping = True
        self._say({"leave": True})
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), EXIT_S)
            except TimeoutError:
                self._kill_process(self._process.pid)
                await self._process.wait()
        await self.release()
        self._dismiss()
        for path in _controls(self._config.paths.runtime):
            path.unlink(missing_ok=True)

    async def release(self) -> None:
        """Leaves the resolver to itself: it answers on until the next supervisor's takes over."""
        await end(self._tasks)

    def _kill_process(self, pid: int) -> None:
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            self._kill(pidfd)
            os.close(pidfd)

    async def _keep(self) -> None:
        await self._membership.provisioned.wait()
        pause = BACKOFF_S
        while True:
            started = time.monotonic()
            try:
                await self._run()
                self.last_error = "it ended"
            except OSError as error:
                self.last_error = str(error)
            if self._stopping:
                return
            lived = time.monotonic() - started
            log.error("resolver ended", extra={"error": self.last_error, "after_s": round(lived, 1)})
            pause = BACKOFF_S if lived >= STABLE_S else min(2 * pause, BACKOFF_MAX_S)
            if lived < STABLE_S:
                await asyncio.sleep(pause / 2)

    async def _run(self) -> None:
        opened = self._open()
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "appliance.naming.process", str(theirs.fileno()),
                pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
            self.on_process(self._process.pid)
            socket.send_fds(ours, [channel.encode({"start": self._start()})], [it.fileno() for it in opened])
        finally:
            theirs.close()
            for sock in opened:
                sock.close()
        self.restarts += 1
        await self._feed(ours)

    def _open(self) -> list[socket.socket]:
        """The resolver's sockets, the one by which it can be told to leave last. Raises OSError."""
        naming, bridge = self._config.naming, self._config.network.bridge
        gateways = [gateway_of(subnet).ip for subnet in self._environment.subnets]
        opened = sockets.open_dns(gateways, bridge, naming.port)
        try:
            if has_mdns(naming):
                opened += sockets.open_mdns(bridge, sorted({it.version for it in gateways}))
            opened.append(self._open_control())
        except OSError:
            for sock in opened:
                sock.close()
            raise
        return opened

    def _open_control(self) -> socket.socket:
        """Where it can be told to leave, beside where those before it can. Raises OSError."""
        for sock in self._old:
            sock.close()
        runtime = self._config.paths.runtime
        self._old, path = _connected(runtime), _beside(runtime)
        path.unlink(missing_ok=True)
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        control.bind(str(path))
        path.chmod(0o600)
        control.listen(4)
        return control

    def _start(self) -> dict[str, Any]:
        uid, gid = self._user
        clients = [str(subnet) for subnet in self._environment.subnets]
        return {"settings": self._settings(), "clients": clients, "log": self._config.log.level, "uid": uid, "gid": gid}

    def _settings(self) -> dict[str, Any]:
        naming, network = self._config.naming, self._config.network
        return {
            "zones": [naming.zone, *naming.extra_zones],
            "ttl": naming.ttl,
            "ttl_down": naming.ttl_down,
            "ttl_negative": naming.ttl_negative,
            "when_down": naming.when_down,
            "servers": [str(gateway_of(subnet).ip) for subnet in self._environment.subnets],
            "services": [str(it) for it in network.services],
            "overlay": [str(it) for it in network.overlay],
            "cluster_wait": naming.cluster_wait,
            "upstreams": list(naming.upstreams) or self._host_servers(),
            "upstream_timeout": naming.upstream_timeout,
            "cache": naming.cache,
            "log": self._config.log.level,
        }

    def _host_servers(self) -> list[str]:
        """The servers of the host, without the resolver itself and what has no plain address."""
        own = {str(gateway_of(subnet).ip) for subnet in self._environment.subnets}
        return [it for it in of_host()[0] if it not in own and is_address(it)]

    async def _feed(self, stream: socket.socket) -> None:
        """Speaks with the resolver until it ends."""
        assert self._process is not None
        loop = asyncio.get_running_loop()
        stream.setblocking(False)
        self._stream, self._frames = stream, channel.Frames()
        self._out.clear()
        self._changed.clear()
        self._say({"snapshot": [describe(it).to_wire() for it in self._publication.jobs.values()]})
        loop.add_reader(stream.fileno(), self._readable)
        try:
            await self._process.wait()
        finally:
            self.ready.clear()
            loop.remove_reader(stream.fileno())
            loop.remove_writer(stream.fileno())
            self._stream = None
            stream.close()
            for reply in self._replies.values():
                if not reply.done():
                    reply.set_exception(StartError("naming: expected a resolver that is running"))
            self._replies.clear()

    async def attached(self, attachment: Attachment) -> None:
        """Tells a container where names are, if its resolv.conf is ours to write."""
        self._look.set()
        file = resolv.path(attachment)
        if file is None:
            return
        content = resolv.text(attachment, self._config.naming.zone, of_host()[1])
        try:
            if not await asyncio.to_thread(resolv.write, file, content):
                log.info("a resolv.conf that is not ours is left alone", extra={"path": str(file)})
        except OSError as error:
            log.warning("cannot write a container's resolv.conf", extra={"path": str(file), "error": error.strerror})

    async def detached(self, attachment: Attachment) -> None:
        """Takes back what ``attached`` wrote."""
        file = resolv.path(attachment)
        if file is None:
            return
        try:
            await asyncio.to_thread(resolv.remove, file)
        except OSError as error:
            log.warning("cannot remove a container's resolv.conf", extra={"path": str(file), "error": error.strerror})

    def reconfigure(self, config: Config) -> None:
        """Other settings are in force. mDNS needs sockets that were opened at the start, or must not have been, so a
        resolver that is to begin or to end with it is replaced."""
        before, self._config = self._config.naming, config
        if has_mdns(before) != has_mdns(config.naming):
            self._say({"leave": True})
        else:
            self._say({"settings": self._settings()})
        if before.zone != config.naming.zone:
            for attachment in self._environment.attachments():
                self._spawn(self.attached(attachment))

    # --- to the resolver --------------------------------------------------------------------------------------------

    def _on_tables(self, tables: Tables) -> None:
        self._changed |= tables.changed
        if any(job in tables.jobs and tables.jobs[job].needs for job in tables.changed):
            self._look.set()
        if not self._out:
            self._flush_changes()

    def _flush_changes(self) -> None:
        if self._stream is None or not self._changed:
            return
        jobs, changed = self._publication.jobs, self._changed
        self._changed = set()
        put = [describe(jobs[job]).to_wire() for job in sorted(changed) if job in jobs]
        self._say({"put": put, "gone": sorted(job for job in changed if job not in jobs)})

    def _say(self, message: dict[str, Any]) -> None:
        if self._stream is not None:
            self._out += channel.encode(message)
            self._writable()

    def _writable(self) -> None:
        if self._stream is None:
            return
        loop = asyncio.get_running_loop()
        try:
            del self._out[: self._stream.send(self._out)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # it has ended, and its end is being waited for
            self._out.clear()
        if self._out:
            loop.add_writer(self._stream.fileno(), self._writable)
            return
        loop.remove_writer(self._stream.fileno())
        if self._changed:
            self._flush_changes()

    # --- from the resolver ------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        assert self._stream is not None
        try:
            data = self._stream.recv(READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._stream.fileno())
            return
        for message in self._frames.feed(data):
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        match message:
            case {"ready": _}:
                self.ready.set()
                self._take_over()
            case {"need": key}:
                self._spawn(self._need(key))
            case {"used": jobs}:
                for job in jobs:
                    if self._membership.member is not None:
                        self._membership.member.used(job)
            case {"id": number}:
                reply = self._replies.pop(number, None)
                if reply is not None and not reply.done():
                    reply.set_result(message)

    def _take_over(self) -> None:
        """Ours is the one to be found from now on, and the only one."""
        runtime = self._config.paths.runtime
        with suppress(OSError):
            _beside(runtime).replace(runtime / CONTROL)
        self._dismiss()

    def _dismiss(self) -> None:
        """Tells the resolvers of earlier supervisors that they are not needed any more."""
        for sock in self._old:
            with suppress(OSError):
                sock.send(LEAVE)
            sock.close()
        self._old.clear()

    async def _need(self, key: str) -> None:
        try:
            verdict = await self._verdict(key)
        except MessageError:
            verdict = Verdict.ABSENT
        self._flush_changes()
        self._say({"answer": key, "verdict": verdict.value})

    async def _verdict(self, key: str) -> Verdict:
        """What the cluster knows; without a connection it is not waited for. Raises MessageError."""
        if self._is_cut_off():
            return Verdict.NO_ANSWER
        if await self._ask(key):
            return Verdict.FOUND
        return Verdict.NO_ANSWER if self._is_cut_off() else Verdict.ABSENT

    def _is_cut_off(self) -> bool:
        member = self._membership.member
        return member is not None and not member.status()["connected"]

    def _ask(self, key: str) -> Awaitable[bool]:
        return self._membership.resolve(ip_address(key)) if is_address(key) else self._membership.need(key)

    async def _question(self, message: dict[str, Any], key: str) -> dict[str, Any]:
        if not self.ready.is_set():
            raise StartError("naming: expected a resolver that is running")
        self._number += 1
        number, reply = self._number, asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        self._say({name: number if value is None else value for name, value in message.items()})
        try:
            answer = await asyncio.wait_for(reply, REPLY_S)
        finally:
            self._replies.pop(number, None)
        return dict(answer[key])

    async def explain(self, name: str) -> dict[str, Any]:
        """Why a name leads where it leads. Raises StartError or TimeoutError if the resolver cannot say."""
        return await self._question({"explain": name, "id": None}, "explained")

    async def status(self) -> dict[str, Any]:
        """What operators see. One that does not answer in time is not ready, whatever it said before."""
        process = self._process
        said: dict[str, Any] = {"ready": self.ready.is_set(), "restarts": max(0, self.restarts)}
        said |= {"pid": process.pid if process else 0, "last_error": self.last_error}
        try:
            return {**said, "counters": await self._question({"status": None}, "counters")}
        except (StartError, TimeoutError):
            return {**said, "ready": False, "counters": {}}

    # --- what the instances here are going to call ------------------------------------------------------------------

    async def _follow_needs(self) -> None:
        """Has what the descriptors of the services here name in the tables, from their deployment on."""
        while True:
            jobs = self._publication.jobs
            here = {it.service for it in self._environment.attachments()}
            for job in sorted({need for name in here if name in jobs for need in jobs[name].needs}):
                if job not in jobs:
                    self._spawn(self._fetch(job))
                elif self._membership.member is not None:
                    self._membership.member.used(job)
            with suppress(TimeoutError):
                async with asyncio.timeout(NEEDS_S):
                    await self._look.wait()
            self._look.clear()

    async def _fetch(self, job: str) -> None:
        try:
            await self._membership.need(job)
        except MessageError as error:
            log.warning("needs", extra={"error": str(error)})

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("naming: a task ended", exc_info=error)


def dismiss(runtime: Path) -> None:
    """Tells the resolvers of earlier supervisors to leave, where there is to be none; nothing if there is none."""
    for old in _connected(runtime):
        with suppress(OSError), old:
            old.send(LEAVE)
    for path in _controls(runtime):
        path.unlink(missing_ok=True)


def _beside(runtime: Path) -> Path:
    """Where a resolver is found that is not ready yet."""
    return (runtime / CONTROL).with_suffix(".new")


def _controls(runtime: Path) -> tuple[Path, Path]:
    return runtime / CONTROL, _beside(runtime)


def _connected(runtime: Path) -> list[socket.socket]:
    """Connections to the resolvers that are there; what they do not take in ``LEAVE_S`` is an error."""
    found = []
    for path in _controls(runtime):
        old = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old.settimeout(LEAVE_S)
        try:
            old.connect(str(path))
            found.append(old)
        except OSError:
            old.close()
    return found


def has_mdns(naming: NamingConfig) -> bool:
    """Whether names are answered on mDNS too."""
    return naming.mdns and naming.zone.lower().rstrip(".") == "local"
