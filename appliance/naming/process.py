"""The resolver's process: ``python -m appliance.naming.process FD``.

Theory of operation
-------------------
*Started* by the supervisor with one end of a stream socket pair (`channel`). The first frame is ``start``: settings,
clients, and who to be; the sockets come with it as descriptors (SCM_RIGHTS). The process gives up every privilege
(`privileges`), answers nothing until the first snapshot is in, installs the list of its system calls, and says
``ready``.

*One event loop*: the supervisor's stream, the DNS sockets, c-ares' answers, mDNS. Nothing waits for anything but
the loop; a question to the cluster or upstream is a callback.

*When the supervisor dies* the stream ends. The resolver goes on answering from what it knows; what it does not know is
SERVFAIL. It listens on ``paths.runtime/resolver.sock``: the next supervisor connects, starts another resolver on
sockets of its own, and sends ``leave``. A resolver that is told to stop (SIGTERM, ``leave``) says goodbye on mDNS
unless another takes over.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import time
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path
from random import Random
from typing import Any, Final

import dns.asyncbackend
import dns.rdata
import uvloop

from appliance import privileges
from appliance.naming import channel, names
from appliance.naming.mdns import Mdns
from appliance.naming.multicast import Multicast
from appliance.naming.responder import Responder
from appliance.naming.server import Clients, Server
from appliance.naming.service import Service
from appliance.naming.sockets import MDNS_PORT
from appliance.naming.upstream import Upstream
from appliance.naming.waiting import Verdict
from appliance.naming.zone import Settings
from appliance.observe.log import configure

log = logging.getLogger(__name__)

USED_S: Final = 1.0
"""Seconds between two reports of which jobs' names were asked for."""
TICK_S: Final = 0.05
"""How late the end of a wait for the cluster may be noticed."""
READ: Final = 1 << 18
DESCRIPTORS_MAX: Final = 64
START_MAX: Final = 65_536


def settings_of(data: dict[str, Any]) -> Settings:
    """How to answer, from the supervisor's frame."""
    return Settings(
        zones=tuple(names.parse(zone) for zone in data["zones"]),
        ttl=data["ttl"],
        ttl_down=data["ttl_down"],
        ttl_negative=data["ttl_negative"],
        when_down=data["when_down"],
        servers=tuple(ip_address(it) for it in data["servers"]),
        services=tuple(ip_network(it) for it in data["services"]),
        overlay=tuple(ip_network(it) for it in data["overlay"]),
    )


class Resolver:
    """See the module."""

    def __init__(self, supervisor: socket.socket, start: dict[str, Any], sockets: list[socket.socket]) -> None:
        self._loop = asyncio.get_running_loop()
        self._start = start
        self._sockets = sockets
        self._supervisor: socket.socket | None = supervisor
        self._out = bytearray()
        self._frames = channel.Frames()
        self._upstream = self._new_upstream(start["settings"])
        self._responder = Responder(
            settings_of(start["settings"]), self._need, lambda q, r: self._upstream.ask(q, r), time.monotonic,
            start["settings"]["cluster_wait"],
        )  # fmt: skip
        self._server = Server(self._responder, [ip_network(it) for it in start["clients"]], time.monotonic)
        self._multicast = Multicast(self._responder.zone, self._wanted, Random())
        clients = Clients(ip_network(it) for it in start["clients"])
        self._mdns = Mdns(self._multicast, (it for it in sockets if is_mdns(it)), clients)
        self._serving = False
        self._replaced = False
        self._control = next((it for it in sockets if it.family == socket.AF_UNIX), None)
        self.leaving = asyncio.Event()

    def _new_upstream(self, settings: dict[str, Any]) -> Upstream:
        return Upstream(
            settings["upstreams"], settings["upstream_timeout"], settings["cache"], settings["ttl_negative"]
        )

    async def run(self) -> None:
        """Serves until it is told to leave."""
        assert self._supervisor is not None
        self._loop.add_reader(self._supervisor.fileno(), self._readable)
        tasks = [self._loop.create_task(self._report()), self._loop.create_task(self._expire())]
        if self._control is not None:
            self._control.setblocking(False)
            self._loop.add_reader(self._control.fileno(), self._accept)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.leaving.set)
        await self.leaving.wait()
        for task in tasks:
            task.cancel()
        self._mdns.close(goodbye=not self._replaced)
        self._server.close()
        await self._upstream.close()

    def _accept(self) -> None:
        """A later supervisor is there: wait for its word that another resolver is ready."""
        assert self._control is not None
        try:
            caller, _ = self._control.accept()
        except OSError:
            return
        caller.setblocking(False)
        self._loop.add_reader(caller.fileno(), self._dismissed, caller)

    def _dismissed(self, caller: socket.socket) -> None:
        self._loop.remove_reader(caller.fileno())
        with suppress(OSError):
            if caller.recv(16):
                log.info("another resolver is ready, leaving")
                self._replaced = True
                self.leaving.set()
        caller.close()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(USED_S)
            used, self._responder.hot.used = self._responder.hot.used, set()
            used.discard("")
            if used:
                self._say({"used": sorted(used)})

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._responder.waiting.expire(time.monotonic())

    # --- the supervisor ---------------------------------------------------------------------------------------------

    def _need(self, key: str) -> None:
        if self._supervisor is None:
            self._loop.call_soon(self._responder.answered, key, Verdict.NO_ANSWER)
        else:
            self._say({"need": key})

    def _wanted(self, key: str) -> None:
        """A question on mDNS that only the cluster can answer: whoever asks repeats it, or hears the announcement."""
        self._responder.waiting.join(key, lambda _: None, time.monotonic())

    def _say(self, message: dict[str, Any]) -> None:
        if self._supervisor is None:
            return
        self._out += channel.encode(message)
        self._writable()

    def _writable(self) -> None:
        if self._supervisor is None:
            return
        try:
            sent = self._supervisor.send(self._out)
            del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._alone()
            return
        if self._out:
            self._loop.add_writer(self._supervisor.fileno(), self._writable)
        else:
            self._loop.remove_writer(self._supervisor.fileno())

    def _readable(self) -> None:
        if self._supervisor is None:
            return
        try:
            data = self._supervisor.recv(READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._alone()
            return
        for message in self._frames.feed(data):
            self._obey(message)

    def _alone(self) -> None:
        """The supervisor is gone: answer on from what is known."""
        if self._supervisor is None:
            return
        log.warning("the supervisor is gone, answering on")
        self._loop.remove_reader(self._supervisor.fileno())
        self._loop.remove_writer(self._supervisor.fileno())
        self._supervisor.close()
        self._supervisor = None
        self._out.clear()
        if not self._serving:  # it knows nothing, so it is of no use
            self.leaving.set()

    def _obey(self, message: dict[str, Any]) -> None:
        match message:
            case {"snapshot": services}:
                self._changed(self._responder.snapshot(Service.from_wire(it) for it in services))
                if not self._serving:
                    self._serving = True
                    self._loop.create_task(self._serve())
            case {"put": put, "gone": gone}:
                self._changed(self._responder.update([Service.from_wire(it) for it in put], gone))
            case {"answer": key, "verdict": verdict}:
                self._responder.answered(key, Verdict(verdict))
            case {"settings": settings}:
                self._configure(settings)
            case {"explain": name, "id": number}:
                self._say({"explained": self._explain(name), "id": number})
            case {"status": number}:
                self._say({"counters": self.counters(), "id": number})
            case {"leave": _}:
                self.leaving.set()

    def _changed(self, jobs: set[str]) -> None:
        if jobs and self._serving:
            self._mdns.update(jobs)

    async def _serve(self) -> None:
        await self._server.start(it for it in self._sockets if is_dns(it))
        self._mdns.start()
        self._mdns.update(self._responder.zone.services)
        gc.collect()
        privileges.confine(privileges.RESOLVER)
        gc.freeze()  # names that stay need not be looked at again: a full collection would be a pause of milliseconds
        self._say({"ready": True})
        log.info("answering", extra={"services": len(self._responder.zone.services)})

    def _configure(self, settings: dict[str, Any]) -> None:
        configure(settings["log"])
        self._responder.configure(settings_of(settings))
        self._multicast.zone = self._responder.zone
        self._responder.waiting.wait = settings["cluster_wait"]
        old, self._upstream = self._upstream, self._new_upstream(settings)
        self._loop.create_task(old.close())

    def _explain(self, name: str) -> dict[str, Any]:
        try:
            return self._responder.explain(name)
        except Exception as error:
            return {"error": f"name: expected a domain name, got {name[:80]!r} ({error})"}

    def counters(self) -> dict[str, int]:
        """What was counted, and how much is held."""
        held = {
            "services": len(self._responder.zone.services),
            "hot_answers": len(self._responder.hot),
            "waiting": len(self._responder.waiting),
            "connections": len(self._server.connections),
        }
        upstream = {f"upstream-{name}": count for name, count in self._upstream.counters.items()}
        mdns = {f"mdns-{name}": count for name, count in self._multicast.counters.items()}
        return {**self._responder.counters, **upstream, **mdns, **held}


def is_dns(sock: socket.socket) -> bool:
    """Whether a socket is the DNS server's, and neither mDNS' nor the one to leave by."""
    return sock.family != socket.AF_UNIX and not is_mdns(sock)


def is_mdns(sock: socket.socket) -> bool:
    """Whether a socket is mDNS'."""
    return sock.family != socket.AF_UNIX and sock.getsockname()[1] == MDNS_PORT


def receive_start(supervisor: socket.socket) -> tuple[dict[str, Any], list[socket.socket]]:
    """The first frame, and the sockets that come with it. Raises ValueError."""
    data, fds, _, _ = socket.recv_fds(supervisor, START_MAX, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC)
    frames = list(channel.Frames().feed(data))
    if len(frames) != 1 or "start" not in frames[0]:
        raise ValueError("expected a start frame")
    return frames[0]["start"], [socket.socket(fileno=fd) for fd in fds]


def main() -> None:
    """Entry of the process."""
    supervisor = socket.socket(fileno=int(sys.argv[1]))
    start, sockets = receive_start(supervisor)
    Path("/proc/self/comm").write_text("edge-resolver")
    configure(start["log"])
    preload()
    privileges.drop(start["uid"], start["gid"])
    privileges.without_io_uring()
    supervisor.setblocking(False)
    uvloop.run(_run(supervisor, start, sockets))


def preload() -> None:
    """Imports now what dnspython imports when it meets a type, or asks: whom this process becomes may not read where we
    are installed, and records of a type that cannot be imported would be bytes without a meaning, for good."""
    dns.rdata.load_all_types()
    dns.asyncbackend.get_backend("asyncio")


async def _run(supervisor: socket.socket, start: dict[str, Any], sockets: list[socket.socket]) -> None:
    await Resolver(supervisor, start, sockets).run()


if __name__ == "__main__":
    main()
