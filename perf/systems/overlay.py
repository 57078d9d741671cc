"""Overlays of others: a daemon on each node with a device of its own, over which the other node's containers are
routed.

Theory of operation ------------------- An adapter says how a daemon is configured and started; everything else is the
same for all of them and is here. A daemon is started as a process of the lab (`appliance.lab.processes`): so it is
recorded, ends with the lab, and no run leaves one behind. Its files are in the lab's directory and vanish with it.
When the device is there it gets its address and the routes. `set_up` returns when a packet has crossed the overlay,
which for most of them takes a handshake; one that carries none within READY_S fails, with the end of its log.

The containers' MTU is what the overlay leaves of the underlay's 1500 bytes, so that nothing is fragmented on the way.
"""

from __future__ import annotations

import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from typing import Any

from appliance.lab import processes
from appliance.lab.files import Files
from appliance.lab.plan import Node
from appliance.lab.processes import inside
from perf import net, topology
from perf.systems.system import WORKER, Process, System
from perf.topology import PAIRS, PLAN, Path, Subnet

READY_S = 20.0
POLL_S = 0.05
LOG_CHARACTERS = 2000


class Overlay(System):
    """What all of them have in common."""

    number: int
    """Of the system's addresses; its port is PORT + number."""
    mtu: int
    """Of the device and the containers."""
    v6 = True
    """Whether it carries IPv6."""

    @property
    def port(self) -> int:
        """UDP port of the daemons on the underlay."""
        return 40_000 + self.number

    def device(self, node: Node) -> str:
        """The daemon's device. Control sockets of some are in one directory, by its name: so no two nodes share one."""
        return f"p{self.number}-{node.name}"

    @abstractmethod
    def prepare(self) -> None:
        """Writes keys and configuration of both nodes. Raises NetError."""

    @abstractmethod
    def command(self, node: Node) -> list[str]:
        """The daemon of a node, in the foreground."""

    def configure(self, node: Node, other: Node) -> None:
        """What is left to do when the device is there. Raises NetError."""

    def addresses(self, node: Node) -> tuple[str, ...]:
        """Those of a node's device, with prefix length; none where the daemon sets them."""
        return Subnet(self.number, 0).host(node.number)

    def files(self, node: Node) -> File:
        """The directory of a node's daemon."""
        directory = Files(net.LAB).of(f"{self.name}-{node.name}")
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def set_up(self) -> Path:
        """Containers, daemons and routes; a packet has crossed when this returns. Raises NetError."""
        path = topology.join(self.name, self.number, self.mtu)
        self.prepare()
        for node in PLAN.nodes:
            directory = self.files(node)
            processes.start(
                net.LAB, node.namespace, self.command(node), directory / "daemon.log", directory / "daemon.pid"
            )
        for node, other in PAIRS:
            self._join(node, other)
        if not self.v6:
            path = replace(path, address_v6="")
        for address in filter(None, (path.address_v4, path.address_v6)):
            self._wait(PLAN.nodes[0], partial(answers, path.client, address), f"{address} answers")
        return path

    def _join(self, node: Node, other: Node) -> None:
        """A node's device with its addresses and the routes to the other node's containers."""
        self._wait(node, lambda: has_device(node, self.device(node)), f"device {self.device(node)}")
        self.configure(node, other)
        device, prefixes = self.device(node), Subnet(self.number, other.number).prefixes
        lines = [f"link set dev {device} mtu {self.mtu} up"]
        lines += [f"addr replace {it} dev {device}" for it in self.addresses(node)]
        lines += [f"route replace {it} dev {device}" for it in (prefixes if self.v6 else prefixes[:1])]
        net.ip(node.namespace, "\n".join(lines) + "\n")

    def _wait(self, node: Node, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + READY_S
        while not ready():
            if time.monotonic() > deadline or not self._lives(node):
                raise net.NetError(f"{self.name} on {node.name}: expected: {what}\n{self._log(node)}")
            time.sleep(POLL_S)

    def _lives(self, node: Node) -> bool:
        record = processes.recorded(self.files(node) / "daemon.pid")
        return record is not None and processes.alive(record)

    def _log(self, node: Node) -> str:
        return (self.files(node) / "daemon.log").read_text(errors="replace")[-LOG_CHARACTERS:]

    def processes(self) -> list[Process]:
        """The daemon of each node."""
        records = ((node, processes.recorded(self.files(node) / "daemon.pid")) for node in PLAN.nodes)
        return [Process(WORKER, node.name, record.pid) for node, record in records if record is not None]

    def describe(self) -> dict[str, Any]:
        """Versions of its Debian packages, and the MTU."""
        return {"mtu": self.mtu, **{package: version(package) for package in self.programs.values()}}


def version(package: str) -> str:
    """Of a Debian package; unknown where dpkg does not know it."""
    try:
        return net.run("dpkg-query", "-W", "-f", "${Version}", package)
    except net.NetError:
        return "unknown"


def has_device(node: Node, device: str) -> bool:
    """Whether a node has a device of that name."""
    done = subprocess.run(["ip", "-n", node.namespace, "link", "show", "dev", device], capture_output=True, check=False)
    return done.returncode == 0


def answers(client: str, address: str) -> bool:
    """Whether a ping from a container comes back within a second."""
    ping = inside(client, ["ping", "-c", "1", "-W", "1", address])
    return subprocess.run(ping, capture_output=True, check=False).returncode == 0
