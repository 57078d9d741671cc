"""A resolver in a node's namespace, a container beside it, and the supervisor's end of the channel in the test's hand.

container ── eth0 10.18.0.2 ── bridge 10.18.0.1, fc00::1 ── resolver ── channel ── this test
"""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

from appliance.naming import channel, sockets
from tests.environment.netns import BRIDGE, Netns

GATEWAYS = ("10.18.0.1", "fc00::1")
CONTAINER = ("10.18.0.2", "fc00::2")
JOB = "shop.prod.web.test"
NAME = "web.test.shop.prod.local"
SETTINGS: dict[str, Any] = {
    "zones": ["local", "svc.example"],
    "ttl": 5,
    "ttl_down": 1,
    "ttl_negative": 2,
    "when_down": "address",
    "servers": list(GATEWAYS),
    "services": ["10.30.0.0/16", "fdff::/16"],
    "overlay": ["10.16.0.0/12", "fc00::/7"],
    "cluster_wait": 2.0,
    "upstreams": [],
    "upstream_timeout": 1.0,
    "cache": 1000,
}


def service(job: str = JOB, number: int = 30, **more: Any) -> dict[str, Any]:
    """A service as the channel has it."""
    data = {
        "job": job,
        "default": "rr",
        "policies": {
            "rr": [f"10.30.{number // 250}.{number % 250}", f"fdff:2000::{number:x}"],
            "closest": [f"10.30.100.{number % 250}", f"fdff:1000::{number:x}"],
        },
        "members": [[0, "10.30.200.1", "fdff::1", True], [1, "10.30.200.2", None, True]],
        "ports": [[80, "tcp", "http"], [8080, "tcp", "p8080"]],
        "metadata": ["version=3", "path=/"],
    }
    return {**data, **more}


class Driver:
    """The supervisor's end."""

    def __init__(self, node: Netns, container: Netns, settings: dict[str, Any], versions: tuple[int, ...]) -> None:
        self.node = node
        self.container = container
        self.heard: list[dict[str, Any]] = []
        self._frames = channel.Frames()
        ours, theirs = socket.socketpair()
        self.socket = ours
        command = ["ip", "netns", "exec", node.name, sys.executable, "-m", "appliance.naming.process"]
        self.process = subprocess.Popen([*command, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        opened = node.call(lambda: self._open(versions))
        clients = ["10.18.0.0/26", "fc00::/120"]
        message = {
            "start": {"settings": settings, "clients": clients, "log": "info", "dns": 8, "uid": 65534, "gid": 65534}
        }
        socket.send_fds(ours, [channel.encode(message)], [it.fileno() for it in opened])
        for it in opened:
            it.close()

    @staticmethod
    def _open(versions: tuple[int, ...]) -> list[socket.socket]:
        opened = sockets.open_dns([ip_address(it) for it in GATEWAYS], BRIDGE, 53)
        return opened + sockets.open_mdns(BRIDGE, versions)

    def say(self, **message: Any) -> None:
        """Sends a frame."""
        self.socket.sendall(channel.encode(message))

    def wait(self, key: str, timeout: float = 10.0) -> dict[str, Any]:
        """The next frame with a key; those that came before it and have not are kept in ``heard``."""
        until = time.monotonic() + timeout
        while True:
            for index, message in enumerate(self.heard):
                if key in message:
                    return self.heard.pop(index)
            self.socket.settimeout(max(0.01, until - time.monotonic()))
            data = self.socket.recv(1 << 16)
            assert data, "the resolver closed the channel"
            self.heard += self._frames.feed(data)

    def counters(self) -> dict[str, int]:
        """What the resolver counted."""
        self.say(status=1)
        return dict(self.wait("counters")["counters"])

    def dig(self, *arguments: str, server: str = GATEWAYS[0]) -> str:
        """What dig prints in the container."""
        return self.container.command("dig", f"@{server}", "+tries=1", "+time=3", *arguments)

    def memory(self) -> int:
        """Resident bytes of the resolver."""
        text = next(line for line in open(f"/proc/{self.process.pid}/status") if line.startswith("VmRSS"))  # noqa: PTH123, SIM115
        return int(text.split()[1]) * 1024

    def close(self) -> None:
        """Ends the resolver."""
        self.socket.close()
        self.process.terminate()
        self.process.wait(10)


def topology(make: Callable[[], Netns]) -> tuple[Netns, Netns]:
    """A node with a bridge, and a container on it."""
    node, container = make(), make()
    node.ip("link", "set", "lo", "up")
    node.ip("link", "add", BRIDGE, "type", "bridge")
    node.ip("addr", "add", f"{GATEWAYS[0]}/26", "dev", BRIDGE)
    node.ip("addr", "add", f"{GATEWAYS[1]}/120", "dev", BRIDGE, "nodad")
    node.ip("link", "set", BRIDGE, "up")
    node.ip("link", "add", "veth0", "type", "veth", "peer", "name", "eth0", "netns", container.name)
    node.ip("link", "set", "veth0", "master", BRIDGE, "up")
    container.ip("link", "set", "lo", "up")
    container.ip("addr", "add", f"{CONTAINER[0]}/26", "dev", "eth0")
    container.ip("addr", "add", f"{CONTAINER[1]}/120", "dev", "eth0", "nodad")
    container.ip("link", "set", "eth0", "up")
    container.ip("route", "add", "default", "via", GATEWAYS[0])
    return node, container


@contextmanager
def resolver(
    make: Callable[[], Netns],
    services: list[dict[str, Any]],
    versions: tuple[int, ...] = (),
    **settings: Any,
) -> Iterator[Driver]:
    """A running resolver that knows these services."""
    node, container = topology(make)
    driver = Driver(node, container, {**SETTINGS, **settings}, versions)
    try:
        driver.say(snapshot=services)
        driver.wait("ready")
        yield driver
    finally:
        driver.close()
