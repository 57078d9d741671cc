"""A real MQTT broker, mosquitto, on a free port of the loopback, for as long as a test wants it."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAM = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
needs_mosquitto = pytest.mark.skipif(PROGRAM is None, reason="needs mosquitto")
START = 10.0
"""Seconds that a broker may take to listen."""
OPEN_TO_ALL = "allow_anonymous true"


class Mosquitto:
    """One broker, that can be killed and come back on its port. ``options`` are lines of its configuration file."""

    def __init__(self, directory: Path, *options: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.log = directory / f"mosquitto-{self.port}.log"
        self._config = directory / f"mosquitto-{self.port}.conf"
        lines = [f"listener {self.port} 127.0.0.1", "user root", "log_type all", *(options or (OPEN_TO_ALL,))]
        self._config.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, and waits until it listens."""
        assert PROGRAM is not None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([PROGRAM, "-c", str(self._config)], stdout=log, stderr=log)
        deadline = time.monotonic() + START
        while not _listens(self.port):
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """Ends it without a farewell."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def mosquitto(directory: Path, *options: str) -> Iterator[Mosquitto]:
    """A running broker."""
    broker = Mosquitto(directory, *options)
    try:
        broker.start()
        yield broker
    finally:
        broker.kill()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
