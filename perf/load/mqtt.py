"""An MQTT 3.1.1 client of which thousands fit one process: frames built by hand, one protocol object a connection.

A whole client library a node (a reader task, locks, timers, a queue) makes the simulated nodes dearer than the manager
that they are there to load. What a node needs of MQTT is little: connect with a will, subscribe, publish with QoS 1,
acknowledge what comes. Numbers in brackets are sections of the MQTT 3.1.1 standard (OASIS).

Theory of operation
-------------------
A `Session` is one connection of one event loop; it owns its transport. Whoever awaits an answer of the broker waits on
a future by packet identifier; when the connection ends, all of them raise OSError. Messages are handed to ``heard``
as they come, in the loop, after their acknowledgement was written. Identifiers are given in turn, IDENTIFIERS of them:
so many requests may be under way at once. No request is repeated: what is lost with a connection counts as lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final, cast

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, DISCONNECT = 1, 2, 3, 4, 8, 9, 12, 14
"""Packet types [2.2.1]."""
IDENTIFIERS: Final = 65_535
KEEPALIVE_S: Final = 0
"""Off [3.1.2.10]: in a storm the simulator may be late, and that is not what is to be found out."""
REFUSED: Final = 0x80
"""A SUBACK's code for a subscription that the broker did not take [3.9.3]."""
LENGTH_MAX: Final = 4
"""Bytes of a remaining length [2.2.3]."""
ANSWER_S: Final = 30.0

Heard = Callable[[str, bytes], None]


def frame(kind: int, flags: int, body: bytes) -> bytes:
    """A packet: its type, its flags, the length of the rest [2.2]."""
    length, rest = bytearray(), len(body)
    while True:
        rest, low = rest >> 7, rest & 0x7F
        length.append(low | (0x80 if rest else 0))
        if not rest:
            return bytes((kind << 4 | flags,)) + bytes(length) + body


def text(value: str | bytes) -> bytes:
    """A string with its length before it [1.5.3]."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("!H", len(raw)) + raw


def connect_frame(name: str, will: tuple[str, bytes] | None = None) -> bytes:
    """CONNECT with a clean session, and a retained will of QoS 1 [3.1]."""
    flags = 0x02 | (0x04 | 0x08 | 0x20 if will else 0)
    last = b"" if will is None else text(will[0]) + text(will[1])
    return frame(CONNECT, 0, text("MQTT") + bytes((4, flags)) + struct.pack("!H", KEEPALIVE_S) + text(name) + last)


def subscribe_frame(identifier: int, topics: tuple[str, ...], qos: int) -> bytes:
    """SUBSCRIBE to topics [3.8]."""
    return frame(SUBSCRIBE, 2, struct.pack("!H", identifier) + b"".join(text(it) + bytes((qos,)) for it in topics))


def publish_frame(identifier: int, topic: str, payload: bytes, retain: bool = False) -> bytes:
    """PUBLISH with QoS 1 [3.3]."""
    return frame(PUBLISH, 2 | retain, text(topic) + struct.pack("!H", identifier) + payload)


def frames(data: bytearray) -> Iterator[tuple[int, int, bytes]]:
    """Takes whole packets off a buffer: type, flags, body. Raises ValueError for a length of more than 4 bytes."""
    while len(data) > 1:
        length = shift = 0
        for at in range(1, 1 + LENGTH_MAX):
            if at == len(data):
                return
            length |= (data[at] & 0x7F) << shift
            shift += 7
            if not data[at] & 0x80:
                break
        else:
            raise ValueError(f"expected a length of at most {LENGTH_MAX} bytes, got {bytes(data[:5])!r}")
        end = at + 1 + length
        if len(data) < end:
            return
        packet = data[0] >> 4, data[0] & 15, bytes(data[at + 1 : end])
        del data[:end]
        yield packet


class Session(asyncio.Protocol):
    """See the module."""

    def __init__(self, heard: Heard) -> None:
        self._heard = heard
        self._data = bytearray()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._number = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport; small packets leave at once."""
        self._transport = cast(asyncio.Transport, transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, error: Exception | None) -> None:
        """Nobody waits for answers any more."""
        self._transport = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError(f"the broker closed the connection: {error}"))

    def data_received(self, data: bytes) -> None:
        """Takes packets apart. Raises ValueError."""
        self._data += data
        for kind, flags, body in frames(self._data):
            if kind == PUBLISH:
                self._published(flags, body)
            elif kind in (CONNACK, PUBACK, SUBACK):
                number = 0 if kind == CONNACK else int.from_bytes(body[:2], "big")
                if (future := self._waiting.pop(number, None)) is not None and not future.done():
                    future.set_result(body[2:] if kind == SUBACK else body[1:2])

    def _published(self, flags: int, body: bytes) -> None:
        end = 2 + int.from_bytes(body[:2], "big")
        topic, qos = body[2:end].decode(), flags >> 1 & 3
        if qos and self._transport is not None:
            self._transport.write(frame(PUBACK, 0, body[end : end + 2]))
        self._heard(topic, body[end + 2 if qos else end :])

    async def _ask(self, number: int, packet: bytes) -> bytes:
        """The rest of the answer with this identifier. Raises OSError, TimeoutError."""
        if self._transport is None:
            raise ConnectionResetError("the connection has ended")
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._transport.write(packet)
        async with asyncio.timeout(ANSWER_S):
            return await future

    def _next(self) -> int:
        self._number = self._number % IDENTIFIERS + 1
        return self._number

    async def enter(self, name: str, will: tuple[str, bytes] | None) -> None:
        """Says who is there. Raises OSError if the broker does not let it in."""
        code = await self._ask(0, connect_frame(name, will))
        if code != b"\x00":
            raise ConnectionRefusedError(f"CONNACK: expected 0, got {code!r}")

    async def subscribe(self, *topics: str, qos: int = 1) -> None:
        """Subscribes. Raises OSError if the broker refuses one of them."""
        number = self._next()
        codes = await self._ask(number, subscribe_frame(number, topics, qos))
        if REFUSED in codes:
            raise ConnectionRefusedError(f"SUBACK: expected every topic to be taken, got {codes!r}")

    async def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Publishes with QoS 1; returns when the broker has it. Raises OSError, TimeoutError."""
        number = self._next()
        await self._ask(number, publish_frame(number, topic, payload, retain))

    def close(self) -> None:
        """Says goodbye, so that there is no will."""
        if self._transport is not None:
            with contextlib.suppress(OSError):
                self._transport.write(frame(DISCONNECT, 0, b""))
            self._transport.close()


async def session(host: str, port: int, name: str, heard: Heard, will: tuple[str, bytes] | None = None) -> Session:
    """A connection that the broker let in. Raises OSError, TimeoutError."""
    async with asyncio.timeout(ANSWER_S):
        _, made = await asyncio.get_running_loop().create_connection(lambda: Session(heard), host, port)
    try:
        await made.enter(name, will)
    except BaseException:
        made.close()
        raise
    return made
