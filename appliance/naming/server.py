"""DNS on the bridge's addresses: UDP and TCP sockets around a responder.

*Runs* in the resolver's event loop. The sockets were opened and bound by the supervisor, each to one address and to one
device: the bridge, or the loopback for programs of the node itself. So nobody outside can reach them, whatever
address they claim; who is on the bridge and claims an address that is not of the node's subnets is refused.

UDP: `BATCH` queries are taken from a socket before others get their turn. Answers that the kernel does not take at
once are dropped and counted, as a network would.

TCP (RFC 7766): at most `CONNECTIONS_MAX` connections, `CLIENT_MAX` of one client; when they are used up, the one that
has been silent longest makes room. One that says nothing for `IDLE_S` is closed, and so is one with `UNANSWERED_MAX`
questions whose answers it does not read. Memory is bounded by the product: one message of 64 KiB and as much of
answers a connection.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from ipaddress import ip_address
from typing import Final, cast

from appliance.naming import packet
from appliance.naming.responder import Responder
from appliance.tables.layout import IPNetwork

BATCH: Final = 64
QUERY_MAX: Final = 4096
"""Bytes of a datagram that may be a query."""
CONNECTIONS_MAX: Final = 256
CLIENT_MAX: Final = 64
IDLE_S: Final = 10.0
UNANSWERED_MAX: Final = 64
CLIENTS_KEPT: Final = 4096
REFUSALS_PER_S: Final = 100
"""Refusals sent a second: the claimed address gets them, so they must not be worth a flood."""
LENGTH: Final = 2


class Clients:
    """Who may ask: addresses of the node's subnets."""

    def __init__(self, networks: Iterable[IPNetwork]) -> None:
        self._networks = tuple(networks)
        self._known: dict[str, bool] = {}

    def allowed(self, address: str) -> bool:
        """Whether this address may ask."""
        known = self._known.get(address)
        return self._look(address) if known is None else known

    def _look(self, address: str) -> bool:
        parsed = ip_address(address.partition("%")[0])
        if len(self._known) >= CLIENTS_KEPT:
            self._known.clear()
        self._known[address] = found = any(parsed in network for network in self._networks)
        return found


class Refusals:
    """How many clients are told that they are refused."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._second = 0.0
        self._left = 0

    def take(self) -> bool:
        """Whether one more may be sent."""
        now = self._clock()
        if now - self._second >= 1.0:
            self._second, self._left = now, REFUSALS_PER_S
        self._left -= 1
        return self._left >= 0


class Datagrams:
    """One UDP socket."""

    def __init__(self, sock: socket.socket, responder: Responder, clients: Clients, refusals: Refusals) -> None:
        self._sock = sock
        self._responder = responder
        self._clients = clients
        self._refusals = refusals

    def readable(self) -> None:
        """Answers what has arrived."""
        receive, send, allowed = self._sock.recvfrom, self._sock.sendto, self._clients.allowed
        answer = self._responder.answer
        for _ in range(BATCH):
            try:
                data, client = receive(QUERY_MAX)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an earlier answer was refused by its client: an ICMP error that is no concern of ours
                continue
            if not allowed(client[0]):
                self._refuse(data, client)
                continue
            reply = answer(data, partial(self.send, client), datagram=True)
            if reply is not None:
                try:
                    send(reply, client)
                except OSError:
                    self._responder.counters["send-failed"] += 1

    def send(self, client: tuple[object, ...], reply: bytes) -> None:
        """Sends an answer."""
        try:
            self._sock.sendto(reply, client)
        except OSError:
            self._responder.counters["send-failed"] += 1

    def _refuse(self, data: bytes, client: tuple[object, ...]) -> None:
        self._responder.counters["refused-client"] += 1
        if len(data) >= packet.HEADER and not data[2] & 0x80 and self._refusals.take():
            self.send(client, packet.failure(data, packet.REFUSED))


class Connections:
    """All TCP connections, the one that has been silent longest first."""

    def __init__(self, responder: Responder, clients: Clients) -> None:
        self.responder = responder
        self.clients = clients
        self._open: OrderedDict[Connection, str] = OrderedDict()
        self._of_client: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: Connection, client: str) -> bool:
        """Whether a new connection may stay."""
        if not self.clients.allowed(client):
            self.responder.counters["refused-client"] += 1
            return False
        if self._of_client[client] >= CLIENT_MAX:
            self.responder.counters["refused-connection"] += 1
            return False
        if len(self._open) >= CONNECTIONS_MAX:
            self.responder.counters["closed-for-another"] += 1
            next(iter(self._open)).close()
        self._open[connection] = client
        self._of_client[client] += 1
        return True

    def touch(self, connection: Connection) -> None:
        """A connection said something."""
        if connection in self._open:
            self._open.move_to_end(connection)

    def leave(self, connection: Connection) -> None:
        """A connection is closed, or about to be."""
        client = self._open.pop(connection, None)
        if client is not None:
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]

    def close(self) -> None:
        """Closes them all."""
        for connection in list(self._open):
            connection.close()


class Connection(asyncio.Protocol):
    """One TCP connection."""

    def __init__(self, connections: Connections) -> None:
        self._all = connections
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unanswered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Stays, or is closed at once."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, and no subclass
        self._transport.set_write_buffer_limits(high=packet.TCP_MAX)
        if not self._all.admit(self, transport.get_extra_info("peername")[0]):
            self._transport.abort()
            return
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Answers the questions that are complete."""
        self._buffer += data
        while self._transport is not None and len(self._buffer) >= LENGTH:
            end = LENGTH + int.from_bytes(self._buffer[:LENGTH], "big")
            if len(self._buffer) < end:
                return
            message = bytes(self._buffer[LENGTH:end])
            del self._buffer[:end]
            self._ask(message)

    def _ask(self, message: bytes) -> None:
        self._all.touch(self)
        self._wait()
        if len(message) < packet.HEADER or self._unanswered >= UNANSWERED_MAX:
            self._all.responder.counters["closed-connection"] += 1
            self.close()
            return
        self._unanswered += 1
        reply = self._all.responder.answer(message, self._reply, datagram=False)
        if reply is not None:
            self._reply(reply)

    def _reply(self, reply: bytes) -> None:
        self._unanswered -= 1
        if self._transport is not None:
            self._transport.write(len(reply).to_bytes(LENGTH, "big") + reply)

    def pause_writing(self) -> None:
        """The client does not read: it is not worth more memory."""
        self._all.responder.counters["closed-connection"] += 1
        if self._transport is not None:
            self._transport.abort()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._silent)

    def _silent(self) -> None:
        self._all.responder.counters["closed-idle"] += 1
        self.close()

    def close(self) -> None:
        """Closes the connection after what was already answered."""
        self._all.leave(self)
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._all.leave(self)
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()


class Server:
    """All sockets of the DNS server."""

    def __init__(self, responder: Responder, networks: Iterable[IPNetwork], clock: Callable[[], float]) -> None:
        clients = Clients(networks)
        self._responder = responder
        self._clients = clients
        self._refusals = Refusals(clock)
        self.connections = Connections(responder, clients)
        self._sockets: list[socket.socket] = []
        self._listeners: list[asyncio.Server] = []

    async def start(self, sockets: Iterable[socket.socket]) -> None:
        """Serves on these sockets: datagrams, or streams that listen."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            sock.setblocking(False)
            if sock.type == socket.SOCK_DGRAM:
                edge = Datagrams(sock, self._responder, self._clients, self._refusals)
                loop.add_reader(sock.fileno(), edge.readable)
                self._sockets.append(sock)
            else:
                self._listeners.append(await loop.create_server(lambda: Connection(self.connections), sock=sock))

    def close(self) -> None:
        """Answers what has arrived, and closes all sockets."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            loop.remove_reader(sock.fileno())
            Datagrams(sock, self._responder, self._clients, self._refusals).readable()
            sock.close()
        for listener in self._listeners:
            listener.close()
        self.connections.close()
