"""A client that stops reading holds up nothing."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.config import Config
from appliance.supervisor import api
from appliance.supervisor.capturing import Capturing

REQUEST = b"POST /v1/capture HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


class Flood:
    """Captures without end."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def run(self, *_: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            self.ended.set()


@asynccontextmanager
async def stalled(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Flood, Any, socket.socket]]:
    """An API, and a capture's client that has stopped to read; what ends the API is called by then, or here."""
    flood = Flood()
    monkeypatch.setattr(Capturing, "run", flood.run)
    monkeypatch.setattr(Capturing, "chosen", lambda *_: None)
    supervisor: Any = SimpleNamespace(config=Config.model_validate({"api": {"socket": directory / "api.sock"}}))
    close = await api.serve(supervisor)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, str(directory / "api.sock"))
        await loop.sock_sendall(client, REQUEST)
        assert (await loop.sock_recv(client, 12)).endswith(b"200")
        yield flood, close, client
    await close()


def test_it_does_not_hold_up_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with stalled(tmp_path, monkeypatch) as (flood, close, _):
            async with asyncio.timeout(20):
                await close()
            assert flood.ended.is_set()

    monkeypatch.setattr(api, "END_S", 0.2)
    asyncio.run(scene())


def test_its_capture_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with stalled(tmp_path, monkeypatch) as (flood, _, _), asyncio.timeout(20):
            await flood.ended.wait()

    monkeypatch.setattr(api, "STALLED_S", 0.2)
    asyncio.run(scene())
