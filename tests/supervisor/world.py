"""A cluster on one machine: a manager with its broker, nodes that run the appliance, containers.

hub   br0 192.0.2.254/24   manager, broker
       ├── node1  up0 192.0.2.1/24   appliance run
       └── node2  up0 192.0.2.2/24   appliance run
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.client import ApiError, Client
from appliance.config import Config
from appliance.config_text import in_force
from tests.environment.netns import Netns, namespaces
from tests.manager.processes import ROOT, Manager, Process

HUB = "192.0.2.254"
MQTT_PORT = 10003
READY_S = 90.0
SETTLE_S = 10.0


def until(condition: Callable[[], Any], what: str, seconds: float = SETTLE_S) -> Any:
    """The first true value of a condition; fails with a sentence if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return value


class Inside(Process):
    """An `appliance cluster …` in a namespace."""

    def __init__(self, namespace: Netns, arguments: list[str], log: Path) -> None:
        super().__init__(arguments, log)
        self.namespace = namespace

    def command(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace.name, *super().command()]


class HubManager(Manager):
    """A manager whose REST interface is reached from within its namespace."""

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        assert isinstance(self.process, Inside)
        return self.process.namespace.call(lambda: super(HubManager, self).call(method, path, body))


def _name(pid: int) -> str:
    """A process's name; empty if it has just ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@dataclass
class Node:
    """A node. Its supervisor is started and ended by the test."""

    name: str
    address: str
    namespace: Netns
    directory: Path
    settings: dict[str, Any]
    popen: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        """The local API."""
        return self.directory / "api.sock"

    @property
    def docker(self) -> Path:
        """The network driver for Docker."""
        return self.directory / "docker.sock"

    @property
    def api(self) -> Client:
        """A client of the local API."""
        return Client(self.socket, timeout=15)

    @property
    def log(self) -> Path:
        """What the supervisor writes to standard error."""
        return self.directory / "log"

    @property
    def state(self) -> Path:
        """What survives a reboot."""
        return self.directory / "state"

    def start(self, program: str = "appliance", after: int = 0) -> "Node":
        """Starts the supervisor, or a program that is one (``dying``), and waits until its API answers."""
        self.launch(program, after)
        until(self._answers, f"{self.name} is ready", READY_S)
        return self

    def launch(self, program: str = "appliance", after: int = 0) -> None:
        """Starts it."""
        file = self.directory / "appliance.toml"
        file.write_text(in_force(Config.model_validate(self._config())))
        arguments = ["run", "-c", str(file)] if program == "appliance" else [str(file), str(after)]
        command = ["ip", "netns", "exec", self.namespace.name, sys.executable, "-m", program, *arguments]
        with self.log.open("ab") as log:
            environment = {**os.environ, **self.environment}
            self.popen = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def _answers(self) -> bool:
        assert self.popen is not None
        assert self.popen.poll() is None, self.log.read_text()
        try:
            self.api.status()
        except ApiError:
            return False
        return True

    def _config(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "node": {"address": self.address},
            "workers": {"count": 1, "flows": 1024},
            "api": {"socket": self.socket, "docker": self.docker},
            "paths": {"state": self.state, "runtime": self.directory / "run", "cache": Config().paths.cache},
        }
        return {name: defaults.get(name, {}) | self.settings.get(name, {}) for name in defaults | self.settings}

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends the supervisor; its exit status."""
        assert self.popen is not None
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(20)

    def end(self) -> None:
        """Ends the supervisor and all that it started."""
        if self.popen is not None and self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        until(self._is_empty, f"{self.name}: nothing runs any more")

    def _is_empty(self) -> bool:
        """Whether nothing runs; what outlives its supervisor on purpose is ended."""
        for pid in self.processes():
            if _name(pid).startswith("edge-"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return not self.processes()

    def resolvers(self) -> list[int]:
        """The resolvers that run in the node's namespace."""
        return [pid for pid in self.processes() if _name(pid) == "edge-resolver"]

    def processes(self) -> list[int]:
        """What runs in the node's namespace."""
        return [int(pid) for pid in self.namespace_pids()]

    def named(self) -> dict[int, str]:
        """What runs in the node's namespace, by name."""
        return {pid: _name(pid) for pid in self.processes()}

    def namespace_pids(self) -> list[str]:
        """The same as text."""
        done = subprocess.run(["ip", "netns", "pids", self.namespace.name], capture_output=True, text=True, check=True)
        return done.stdout.split()

    def hosts(self) -> dict[str, dict[str, Any]]:
        """The host table, by address."""
        return {it["address"]: it for it in self.api.hosts()}


@dataclass
class World:
    """The hub, and what is made on it."""

    directory: Path
    make: Callable[[], Netns]
    stack: ExitStack
    nodes: list[Node] = field(default_factory=list)
    managers: int = 0

    def __post_init__(self) -> None:
        self.hub = self.make()
        self.hub.ip("link", "set", "lo", "up")
        self.hub.ip("link", "add", "br0", "type", "bridge")
        self.hub.ip("addr", "add", f"{HUB}/24", "dev", "br0")
        self.hub.ip("link", "set", "br0", "up")

    def manager(self, *options: str) -> Manager:
        """A running manager with its broker; a further one takes the state of the one before, which has ended."""
        self.managers += 1
        state, runtime = self.directory / "cluster", self.directory / "cluster-run"
        arguments = ["run", "--mqtt", f"{HUB}:{MQTT_PORT}", "--rest", "127.0.0.1:10110", "--nats-port", "4222"]
        arguments += ["--state", str(state), "--runtime", str(runtime)]
        process = Inside(self.hub, [*arguments, *options], self.directory / f"manager-{self.managers}.log")
        self.stack.callback(process.stop, signal.SIGKILL)
        process.start()
        return HubManager(process, 10110)

    def node(self, **settings: dict[str, Any]) -> Node:
        """A node on the underlay, with these sections of its configuration."""
        number = len(self.nodes) + 1
        namespace, name, address = self.make(), f"node{number}", f"192.0.2.{number}"
        self.hub.ip("link", "add", f"to{number}", "type", "veth", "peer", "name", "up0", "netns", namespace.name)
        self.hub.ip("link", "set", f"to{number}", "master", "br0", "up")
        namespace.ip("link", "set", "lo", "up")
        namespace.ip("link", "set", "up0", "up")
        namespace.ip("addr", "add", f"{address}/24", "dev", "up0")
        namespace.ip("route", "add", "default", "via", HUB)
        directory = self.directory / name
        directory.mkdir()
        made = Node(name, address, namespace, directory, settings)
        self.nodes.append(made)
        self.stack.callback(made.end)
        return made

    def member(self, identity: str, **settings: dict[str, Any]) -> Node:
        """A node whose configuration makes it a member of the cluster."""
        section = {"id": identity} | settings.pop("node", {})
        cluster = {"url": HUB, "port": MQTT_PORT} | settings.pop("cluster", {})
        return self.node(node={"address": "auto", **section}, cluster=cluster, **settings)

    def unplug(self, node: Node) -> None:
        """Cuts a node off."""
        self.hub.ip("link", "set", f"to{self.nodes.index(node) + 1}", "down")

    def plug(self, node: Node) -> None:
        """Connects it again."""
        self.hub.ip("link", "set", f"to{self.nodes.index(node) + 1}", "up")

    def container(self) -> Netns:
        """An empty container."""
        made = self.make()
        made.ip("link", "set", "lo", "up")
        return made


@contextmanager
def world(directory: Path) -> Iterator[World]:
    """A hub of which nothing runs yet; all that was started is ended."""
    with namespaces() as make, ExitStack() as stack:
        yield World(directory, make, stack)


def ready(node: Node) -> None:
    """Waits until containers can be attached to a node."""
    until(lambda: node.api.cluster()["ready"], f"{node.name} has its subnets")


def ping(container: Netns, address: str, count: int = 1, wait: int = 2) -> bool:
    """Whether a container's echo requests are answered."""
    command = ["ip", "netns", "exec", container.name, "ping", "-c", str(count), "-W", str(wait), "-i", "0.2", address]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def saved(node: Node, name: str) -> Any:
    """A file of a node's state; None if there is none."""
    path = node.state / name
    return json.loads(path.read_text()) if path.exists() else None


def alive(pid: int) -> bool:
    """Whether a process is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
