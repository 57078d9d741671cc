"""The sockets of mDNS: one a family, bound to the bridge by the supervisor, so that nothing leaves it.

*Runs* in the resolver's event loop; `multicast` decides. Packets from addresses that are not on the bridge's own links
(its subnets, and IPv6 link-local) are dropped and counted (RFC 6762 section 11).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable
from typing import Final

from appliance.naming.multicast import Multicast, Send
from appliance.naming.server import Clients
from appliance.naming.sockets import GROUP_V4, GROUP_V6, MDNS_PORT

BATCH: Final = 32
RECEIVE_MAX: Final = 9000
"""RFC 6762 section 17."""


class Mdns:
    """See the module."""

    def __init__(self, multicast: Multicast, sockets: Iterable[socket.socket], clients: Clients) -> None:
        self._multicast = multicast
        self._sockets = list(sockets)
        self._clients = clients
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Listens."""
        for sock in self._sockets:
            sock.setblocking(False)
            self._loop.add_reader(sock.fileno(), self._readable, sock)

    def update(self, changed: Iterable[str]) -> None:
        """Services changed."""
        self._send(self._multicast.update(changed, time.monotonic()), None)

    def close(self, *, goodbye: bool) -> None:
        """Stops; with a goodbye unless somebody else answers for the same names."""
        if goodbye:
            self._send(self._multicast.goodbye(), None)
        if self._timer is not None:
            self._timer.cancel()
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()

    def _readable(self, sock: socket.socket) -> None:
        for _ in range(BATCH):
            try:
                data, source = sock.recvfrom(RECEIVE_MAX)
            except OSError:
                break
            if not source[0].startswith("fe80:") and not self._clients.allowed(source[0]):
                self._multicast.counters["refused-client"] += 1
                continue
            self._send(self._multicast.received(data, source, time.monotonic()), sock)
        self._set_timer()

    def _send(self, sends: Iterable[Send], asked: socket.socket | None) -> None:
        """A packet to one goes out of the socket that the question came to, or that has its family."""
        for send in sends:
            for sock in self._sockets:
                is_v4 = sock.family == socket.AF_INET
                group = (GROUP_V4, MDNS_PORT) if is_v4 else (GROUP_V6, MDNS_PORT)
                if send.to is not None and (sock is not asked if asked is not None else is_v4 != (len(send.to) == 2)):
                    continue
                try:
                    sock.sendto(send.data, send.to or group)
                except OSError:
                    self._multicast.counters["send-failed"] += 1
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._multicast.deadline()
        if deadline is not None:
            self._timer = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._send(self._multicast.tick(time.monotonic()), None)
