"""Gives back whatever it is sent, over TCP and UDP, for ever.

echo.py PORT: prints `ready` once it listens.
"""

import asyncio
import socket
import sys
from typing import Any

SO_RCVBUFFORCE = 33  # asm-generic/socket.h
BUFFER = 4 << 20
"""What was held up comes at once: it must not be lost here."""


class Stream(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


async def main(port: int) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_server(Stream, ("0.0.0.0", "::"), port, backlog=512)
    transport, _ = await loop.create_datagram_endpoint(Datagrams, ("::", port))  # of both families, as is not for TCP
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main(int(sys.argv[1])))
