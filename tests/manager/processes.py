"""Real brokers and managers, as processes, on free ports, with a store of their own."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READY_S = 60.0
ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Process:
    """An `appliance cluster …` that says "ready" on standard error."""

    arguments: list[str]
    log: Path
    popen: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Starts it, and waits until it is ready."""
        with self.log.open("ab") as log:
            start = log.tell()
            self.popen = subprocess.Popen(self.command(), stderr=log, stdout=log, cwd=ROOT)
        end = time.monotonic() + READY_S
        while b": ready " not in self.log.read_bytes()[start:]:
            if self.popen.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"not ready: {self.log.read_text()}")
            time.sleep(0.02)

    def command(self) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "appliance", "cluster", *self.arguments]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it; its exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(READY_S)


@dataclass
class Cluster:
    """One broker's ports and directories, and what runs on them."""

    directory: Path
    stack: ExitStack
    mqtt: int = field(default_factory=free_port)
    nats: int = field(default_factory=free_port)
    started: int = 0

    @property
    def _common(self) -> list[str]:
        state, runtime = self.directory / "state", self.directory / "runtime"
        ports = ["--mqtt", f"127.0.0.1:{self.mqtt}", "--nats-port", str(self.nats)]
        return [*ports, "--state", str(state), "--runtime", str(runtime)]

    def broker(self) -> Process:
        """A broker alone."""
        return self.start("broker", [])

    def manager(self, *options: str, own_broker: bool = True) -> "Manager":
        """A manager, with its own broker or on the one of this cluster."""
        rest = free_port()
        existing = [] if own_broker else ["--broker", f"nats://127.0.0.1:{self.nats}"]
        return Manager(self.start("run", ["--rest", f"127.0.0.1:{rest}", *existing, *options]), rest)

    def start(self, command: str, options: list[str]) -> Process:
        """An `appliance cluster COMMAND`, ready."""
        self.started += 1
        process = Process([command, *self._common, *options], self.directory / f"{command}-{self.started}.log")
        self.stack.callback(process.stop, signal.SIGKILL)
        process.start()
        return process

    def server_pid(self) -> int:
        """The process id of the nats-server that has this cluster's store."""
        return int(next((self.directory / "runtime").glob("nats-server_*.ports")).stem.rpartition("_")[2])

    def kill_server(self) -> None:
        """Ends the nats-server without a chance to tidy up."""
        os.kill(self.server_pid(), signal.SIGKILL)


@dataclass
class Manager:
    """A manager, with a client of its REST interface."""

    process: Process
    port: int

    @property
    def url(self) -> str:
        """Its REST interface."""
        return f"http://127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and body of one request; JSON is decoded, other text is not."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, raw)
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.getheader("Content-Type", "").startswith("application/json")
            return response.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def deploy(self, job: str, instances: int = 1, **more: object) -> dict[str, Any]:
        """Deploys a service; what the manager says of it."""
        names = dict(zip(("app", "namespace", "service", "service_namespace"), job.split("."), strict=True))
        status, made = self.call("PUT", f"/v1/services/{job}", {**names, "instances": instances, **more})
        assert status in (200, 201), made
        assert isinstance(made, dict)
        return made

    def service(self, job: str) -> dict[str, Any]:
        """What the manager says of a service."""
        status, found = self.call("GET", f"/v1/services/{job}")
        assert status == 200, found
        assert isinstance(found, dict)
        return found


@contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """A cluster of which nothing runs yet; all that was started is ended."""
    with ExitStack() as stack:
        yield Cluster(directory, stack)
