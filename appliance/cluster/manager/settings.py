"""What a manager and its broker are told at the start."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cluster.manager.addresses import Plan

if TYPE_CHECKING:
    from appliance.cluster.manager.pki import Pki

ROLL_CALL_S = 30.0
"""How long nodes may take to connect again after the broker's restart."""


@dataclass(frozen=True)
class Routes:
    """What makes a broker one of several that are one cluster."""

    cluster: str
    listen: tuple[str, int]
    """Where the others reach it."""
    others: tuple[tuple[str, int], ...]
    """Where it reaches them; its own address among them does no harm."""


@dataclass(frozen=True)
class BrokerSettings:
    """Where the server listens and keeps its files."""

    state: Path
    runtime: Path
    mqtt_host: str = "0.0.0.0"
    mqtt_port: int = 10003
    port: int = 4222
    name: str = "edge"
    sync: str = "always"
    pki: Pki | None = None
    replicas: int = 1
    """Brokers that keep what MQTT sessions and retained messages need."""
    routes: Routes | None = None

    @property
    def url(self) -> str:
        """Where NATS clients connect."""
        return f"nats://127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Settings:
    """What a manager is told."""

    cluster: str = "edge"
    broker: str | None = None
    """URL of an existing NATS server; None runs one."""
    mqtt: tuple[str, int] = ("0.0.0.0", 10003)
    """Where the broker's MQTT listener is: ours to open, or an existing one to connect to."""
    rest: tuple[str, int] = ("127.0.0.1", 10110)
    nats_port: int = 4222
    state: Path = Path("/var/lib/edge-appliance/cluster")
    runtime: Path = Path("/run/edge-appliance/cluster")
    sync: str = "always"
    replicas: int = 1
    pki: Path | None = None
    """Directory of the cluster's authority (`pki`); None lets everybody in who reaches the broker."""
    broker_name: str = field(default_factory=socket.gethostname)
    """Tells a broker from the others of its cluster, for ever: its part of the state is found by it."""
    route_listen: tuple[str, int] = ("0.0.0.0", 6222)
    route: tuple[tuple[str, int], ...] = ()
    """Where the other brokers of the cluster are; none: there are no others."""
    roll_call_s: float = ROLL_CALL_S
    plan: Plan = field(default_factory=Plan)

    @property
    def broker_settings(self) -> BrokerSettings:
        """Those of the embedded broker. Raises PkiError."""
        host, port = self.mqtt
        known = self.credentials()
        name = self.broker_name if self.route else self.cluster
        routes = Routes(self.cluster, self.route_listen, self.route) if self.route else None
        return BrokerSettings(
            self.state, self.runtime, host, port, self.nats_port, name, self.sync, known, self.replicas, routes
        )

    def credentials(self) -> Pki | None:
        """What the directory has now. Raises PkiError."""
        if self.pki is None:
            return None
        from appliance.cluster.manager.pki import load

        return load(self.pki)


def reachable(host: str) -> str:
    """An address to connect to a listener on this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
