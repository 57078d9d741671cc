"""Several brokers that are one cluster, on one machine: each with its store, its MQTT listener and its routes.

The embedded broker (`appliance.cluster.manager.broker`) is one server; managers join any other by ``--broker``. These
are servers with the embedded one's configuration and what makes them a cluster, to find out what that gives."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.cluster.manager.broker import configuration, executable
from appliance.cluster.manager.settings import BrokerSettings
from tests.manager.processes import free_port

ELECTION_S: Final = 6.0
"""Until servers that start together have found each other and elected leaders."""


@dataclass(frozen=True)
class Server:
    """One of the brokers."""

    pid: int
    nats: int
    mqtt: int


def start(directory: Path, stack: ExitStack, count: int, replicas: int) -> list[Server]:
    """Servers that are one cluster; the stack ends them. ``replicas``: servers that keep each stream of MQTT's."""
    routes = [free_port() for _ in range(count)]
    made = [_server(directory / f"broker{number}", number, routes, replicas, stack) for number in range(count)]
    time.sleep(ELECTION_S)
    return made


def _server(directory: Path, number: int, routes: list[int], replicas: int, stack: ExitStack) -> Server:
    state, runtime, nats, mqtt = directory / "state", directory / "runtime", free_port(), free_port()
    for each in (state, runtime):
        each.mkdir(parents=True)
    settings = BrokerSettings(state, runtime, "127.0.0.1", mqtt, nats, f"broker{number}")
    config: dict[str, Any] = configuration(settings)
    config["mqtt"]["stream_replicas"] = replicas
    config["cluster"] = {
        "name": "storm",
        "listen": f"127.0.0.1:{routes[number]}",
        "routes": [f"nats://127.0.0.1:{port}" for port in routes],
    }
    file = runtime / "nats-server.conf"
    file.write_text(json.dumps(config))
    process = subprocess.Popen([executable(), "-c", file])
    stack.callback(process.wait)
    stack.callback(process.kill)
    return Server(process.pid, nats, mqtt)
