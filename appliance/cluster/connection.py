"""One MQTT connection: aiomqtt's client, and what that and paho below it have no name for.

Theory of operation
-------------------
*Owns* its socket, as paho does. *Used* by the transport, in its event loop; the connection is made in a thread, which
is all that paho offers, and at most ``CONNECT_TIMEOUT`` seconds pass there for each address of the broker.

aiomqtt takes no notice of a connection that ends before the broker let this node in: it would wait for the answer
until its own timeout. A broker does that for good reasons: nats-server holds a client that returns within a second of
having taken over from an older connection of the same name for one second, and closes it then. Here the attempt ends
with the connection.

An attempt that ended leaves nothing behind: an answer to it, later, would be a second connection under this node's
name, and brokers let these two drive out each other.
"""

from __future__ import annotations

import errno
import socket
from typing import Any, Final, Self

import aiomqtt

CONNECT_TIMEOUT: Final = 3.0
"""Seconds: the first packet may be lost, and is repeated after one (RFC 6298)."""


class Connection(aiomqtt.Client):
    """See the module."""

    async def __aenter__(self) -> Self:
        """Connects. Raises MqttError, OSError or ValueError."""
        self._client.connect_timeout = CONNECT_TIMEOUT
        try:
            await super().__aenter__()
        except BaseException:
            self.abandon()
            raise
        if self.socket is None:  # aiomqtt forgets a connection's end that came together with its beginning
            raise aiomqtt.MqttError("the broker let this node in, and closed the connection at once")
        return self

    def _on_disconnect(self, *arguments: Any, **more: Any) -> None:
        if self._connected.done():
            super()._on_disconnect(*arguments, **more)
        else:
            self.give_up(aiomqtt.MqttError("the broker closed the connection before it let this node in"))

    def give_up(self, reason: aiomqtt.MqttError) -> None:
        """Ends an attempt to connect that is under way."""
        if not self._connected.done():
            self._connected.set_exception(reason)

    def abandon(self) -> None:
        """Closes without a farewell, at once. What a thread still makes of it is closed when it is freed."""
        self._client.on_socket_open = self._client.on_socket_register_write = None
        self._client._sock_close()

    @property
    def socket(self) -> Any:
        """The connection's socket, None if there is none, or none yet."""
        return self._client.socket()

    def ask_after(self, seconds: int) -> None:
        """Has silence of so many seconds end with a question to the broker. What the broker was told stays, and paho
        takes another value only before it connects, when the broker would be told that one."""
        self._client._keepalive = seconds

    def acknowledge(self) -> None:
        """Has the kernel acknowledge at once what was read, which it does not do for good when told once (tcp(7)).

        A broker with Nagle's algorithm, as mosquitto by default, holds an answer back until the acknowledgement of the
        question, sent before, is acknowledged itself. Measured here with mosquitto 2.0: 44 ms a question, 4 ms so.
        """
        if self.socket is not None:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def is_stranded(self) -> bool:
        """Whether the connection's own address is not an address of this host any more."""
        sock = self.socket
        if sock is None:
            return False
        own = sock.getsockname()
        with socket.socket(sock.family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((own[0], 0, *own[2:]))
            except OSError as error:
                return error.errno == errno.EADDRNOTAVAIL
        return False
