"""Watches the kernel for what others do to the node's environment, and says so at once.

Theory of operation
-------------------
*Owns* one netlink socket in the node's namespace, subscribed to the changes of links, addresses and routes; the
timers below; and a task for each look at the kernel that is under way. Everything here runs in the supervisor's
event loop, and its callbacks are called there. The socket is ours and not a transport, as uvloop has none for
AF_NETLINK: the loop only says when it can be read. A look at the kernel runs apart, like every operation
(`namespace`).

An event is no more than a hint (`hints`) where to look. What is reported is what the manager sees there between two
operations: so our own changes report nothing, and whoever made the others, each is reported once.

- a container's link: looked at immediately;
- the node's part: looked at `hints.Pace` after the first hint, which is 0.1 s, and longer if it is damaged time and
  again; what a container's link loses while it goes is no damage;
- the uplink: reported `UPLINK_S` after the first hint, without a look. The new address may be the old one.

The kernel drops events if they are not read fast enough (`RECEIVE_BUFFER`), and says so by ENOBUFS. Then everything
is looked at, as at the start. While all links are read for that, events wait in the socket. A look that fails is
repeated after `RETRY_S`, also by looking at everything.

What cannot be seen here: sysctls, as the kernel tells nobody; what happens inside a container whose link stays.
A callback that fails is logged, and nothing else.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from appliance.environment import netlink, work
from appliance.environment.attachment import Attachment, Condition
from appliance.environment.errors import EnvironmentError_
from appliance.environment.hints import Hints, Pace
from appliance.environment.manager import EnvironmentManager
from appliance.environment.namespace import apart
from appliance.tasks import end

log = logging.getLogger(__name__)

UPLINK_S: Final = 0.1
"""An address that changes comes with several events: gone, new, routes."""
RETRY_S: Final = 1.0
RECEIVE_BUFFER: Final = 4 << 20
"""Bytes, as the kernel counts them: some 2,000 events, which is 300 containers that end at once."""
READS_MAX: Final = 32
"""Events that are read before the rest of the loop has its turn; one takes 0.2 ms."""
_MESSAGE_MAX: Final = 1 << 16
_SO_RCVBUFFORCE: Final = 33
_GROUPS: Final = (
    rtnl.RTMGRP_LINK
    | rtnl.RTMGRP_IPV4_IFADDR
    | rtnl.RTMGRP_IPV6_IFADDR
    | rtnl.RTMGRP_IPV4_ROUTE
    | rtnl.RTMGRP_IPV6_ROUTE
)


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Whom to tell. They are called in the watcher's event loop, so they must not block."""

    gone: Callable[[Attachment], object]
    """The link of an attached container is gone, and the manager has dropped it."""
    impaired: Callable[[Attachment], object]
    """The link is there, but an end is down, or was moved out of the container."""
    restored: Callable[[Attachment], object]
    """The link that was impaired passes packets again."""
    damaged: Callable[[], object]
    """The node's part is not as it should be: `EnvironmentManager.converge` has something to do."""
    uplink_changed: Callable[[], object]
    """Links, addresses or routes that are not ours changed: peers may reach this node at another address."""


class Watcher:
    """See the module's theory of operation. `overruns` counts how often the kernel dropped events."""

    def __init__(self, manager: EnvironmentManager, callbacks: Callbacks, receive_buffer: int = RECEIVE_BUFFER) -> None:
        self.overruns = 0
        self._manager = manager
        self._tell = callbacks
        self._receive_buffer = receive_buffer
        self._hints = Hints(manager.wanted.bridge, manager.wanted.tun)
        self._pace = Pace()
        self._impaired: set[str] = set()
        self._socket: socket.socket | None = None
        self._reading = asyncio.Lock()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begins in the calling thread's namespace, after the first `converge`. What has happened since that is
        reported too. Raises OSError or EnvironmentError_."""
        self._socket = _subscribe(self._receive_buffer)
        self._manager.on_gone = lambda lost: _call(self._tell.gone, lost)
        try:
            await self._look_at_everything()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends; no callback is called any more. To be called before the environment is removed."""
        if self._socket is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        self._manager.on_gone = lambda _: None
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        await end(self._tasks)

    # --- Events --------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            self._read()
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.overruns += 1
            log.warning("events lost, looking at everything overruns=%d", self.overruns)
            self._start(self._look_at_everything())
        self._follow()

    def _read(self) -> None:
        """Takes note of what is to be read. Raises OSError."""
        assert self._socket is not None
        for _ in range(READS_MAX):
            try:
                data = self._socket.recv(_MESSAGE_MAX)
            except BlockingIOError:
                return
            for message in MarshalRtnl().parse(data):
                event = netlink.event(message)
                if event is not None:
                    self._hints.see(event)

    def _follow(self) -> None:
        """Starts what the hints call for."""
        for veth in self._hints.take_suspects():
            self._start(self._look_at(veth))
        if self._hints.damage:
            now = asyncio.get_running_loop().time()
            self._after("damage", self._pace.delay(now), lambda: self._start(self._look_at_node()))
        if self._hints.uplink:
            self._after("uplink", UPLINK_S, self._report_uplink)

    # --- Looks ---------------------------------------------------------------------------------------------------

    async def _look_at_everything(self) -> None:
        """No event is read meanwhile: what is read after the links are known is at least as new as they are, or
        leads to what is."""
        loop = asyncio.get_running_loop()
        async with self._reading:
            assert self._socket is not None
            loop.remove_reader(self._socket)
            try:
                links = await apart(work.links)
                attached = [it.veth for it in self._manager.attachments()]
                self._hints.reset(links, attached, self._impaired)
            finally:
                if self._socket is not None:  # stopped meanwhile
                    loop.add_reader(self._socket, self._readable)
        self._follow()

    async def _look_at(self, veth: str) -> None:
        condition = await self._manager.condition(veth)
        attachment = self._manager.attachment(veth)
        match condition:
            case Condition.IMPAIRED if attachment is not None and veth not in self._impaired:
                self._impaired.add(veth)
                _call(self._tell.impaired, attachment)
            case Condition.WHOLE if attachment is not None and veth in self._impaired:
                self._impaired.discard(veth)
                _call(self._tell.restored, attachment)
            case Condition.GONE | Condition.UNKNOWN:
                self._impaired.discard(veth)
                await self._manager.forget_link(veth)

    async def _look_at_node(self) -> None:
        if self._hints.take_damage() and await self._manager.is_damaged():
            self._pace.found(asyncio.get_running_loop().time())
            _call(self._tell.damaged)

    def _report_uplink(self) -> None:
        if self._hints.take_uplink():
            _call(self._tell.uplink_changed)

    # --- Timers and tasks ----------------------------------------------------------------------------------------

    def _after(self, name: str, delay: float, action: Callable[[], None]) -> None:
        """Acts once after the delay, unless that is to happen already."""

        def act() -> None:
            del self._timers[name]
            action()

        if name not in self._timers:
            self._timers[name] = asyncio.get_running_loop().call_later(delay, act)

    def _start(self, look: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(self._safely(look))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _safely(self, look: Coroutine[Any, Any, None]) -> None:
        try:
            await look
        except EnvironmentError_ as error:
            log.warning("cannot look at the kernel, trying again: %s", error)
            self._after("retry", RETRY_S, lambda: self._start(self._look_at_everything()))


def _subscribe(receive_buffer: int) -> socket.socket:
    """A socket that tells what changes. Raises OSError."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
        events.bind((0, _GROUPS))
    except BaseException:
        events.close()
        raise
    return events


def _call(callback: Callable[..., object], *arguments: Attachment) -> None:
    try:
        callback(*arguments)
    except Exception:
        log.exception("a callback of the watcher failed")
