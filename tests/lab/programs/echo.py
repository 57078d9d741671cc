"""Gives back whatever it is sent, over TCP and UDP, for ever.

echo.py PORT: prints `ready` once it listens.
"""

import asyncio
import sys
from typing import Any


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
    await loop.create_datagram_endpoint(Datagrams, ("::", port))  # of both families, as is not for TCP
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main(int(sys.argv[1])))
