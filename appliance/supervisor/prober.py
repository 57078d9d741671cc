"""The executor of round-trip measurement: a socket and a timer for ``rtt.RoundTrips``.

*Owned* by the supervisor, in its event loop. ``arrange`` puts the instances of ``closest`` services in order and says
by the way which nodes to probe; ``on_change`` is called when an order changed, and the supervisor publishes its tables
again, arranged anew. A send that fails is a probe that is lost. A socket that cannot be opened is an error at start.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv6Address

from appliance.supervisor import nearest
from appliance.supervisor.rtt import Node, RoundTrips
from appliance.tables.catalogue import Service


class Prober(asyncio.DatagramProtocol):
    """See the module. To be made within a running event loop."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._trips = RoundTrips()
        self._transport: asyncio.DatagramTransport | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Open the socket, for both families. Raises OSError."""
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", 0))
        sock.setblocking(False)
        self._transport, _ = await self._loop.create_datagram_endpoint(lambda: self, sock=sock)
        self._set_timer()

    def close(self) -> None:
        """Close the socket; nothing is measured any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def arrange(self, find: nearest.Find, services: Sequence[Service]) -> list[Service]:
        """The services with those of ``closest`` in order; their nodes are probed from now on."""
        self._trips.follow(nearest.groups(find, services), self._loop.time())
        self._set_timer()
        return nearest.arrange(find, services, self._trips.order)

    def times(self) -> Mapping[Node, float | None]:
        """Smoothed round-trip times in seconds; None: unknown."""
        return self._trips.times()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Something came to the socket."""
        address = IPv6Address(addr[0].partition("%")[0])
        self._trips.received((address.ipv4_mapped or address, addr[1]), data, self._loop.time())

    def error_received(self, exc: Exception) -> None:
        """A node is not reachable: the probe counts as lost in its time."""

    def _tick(self) -> None:
        probes, changed = self._trips.tick(self._loop.time())
        for probe in probes:
            self._send(probe.node, probe.payload)
        self._set_timer()
        if changed:
            self._on_change()

    def _send(self, node: Node, payload: bytes) -> None:
        address, port = node
        text = f"::ffff:{address}" if address.version == 4 else str(address)
        if self._transport is not None:
            self._transport.sendto(payload, (text, port))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        deadline = None if self._transport is None else self._trips.deadline()
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._tick)
