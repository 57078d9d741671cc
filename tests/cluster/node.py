"""A session with a clock that the test turns, and what it wanted done."""

import json
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, TypeVar

from appliance.cluster.checks import Ranges
from appliance.cluster.commands import Answered, Changed, Command, Publish, Subscribe, Unsubscribe
from appliance.cluster.requests import Deployment, Endpoint
from appliance.cluster.session import Session, Times
from appliance.config import Config
from tests.cluster import wire

RANGES = Ranges(Config().network.overlay, Config().network.services)
HERE = Endpoint(ip_address(wire.ADDRESS), wire.PORT)
OWN = Deployment(wire.JOB, 0, IPv4Address("10.18.0.2"), IPv6Address("fc00::2"))
Kind = TypeVar("Kind", bound=Command)


class Node:
    """Each event's commands are in ``last``, and all of them in ``commands``."""

    def __init__(self, *, connected: bool = True, **times: float) -> None:
        self.now = 1000.0
        self.session = Session(wire.NODE, HERE, Times(**times), RANGES, chance=lambda: 0.5)
        self.session.serve(self.now)
        self.commands: list[Command] = []
        self.last: list[Command] = []
        if connected:
            self.connect()

    def do(self, commands: list[Command]) -> list[Command]:
        self.last = commands
        self.commands += commands
        return commands

    def connect(self) -> list[Command]:
        return self.do(self.session.connected(self.now))

    def disconnect(self) -> list[Command]:
        return self.do(self.session.disconnected(self.now))

    def hear(self, kind: str, payload: bytes) -> list[Command]:
        return self.do(self.session.received(wire.topic(kind), payload, self.now))

    def answer(self, *instances: dict[str, Any], job: str = wire.JOB, key: str = "") -> list[Command]:
        return self.hear("tablequery/result", wire.answer(*instances, job=job, key=key))

    def hint(self, job: str = wire.JOB) -> list[Command]:
        topic = f"jobs/{job}/updates_available"
        return self.do(self.session.received(topic, b'{"type":"DEPLOYMENT"}', self.now))

    def resolve(self, address: str) -> list[Command]:
        return self.do(self.session.resolve(ip_address(address), self.now))

    def need(self, job: str = wire.JOB) -> list[Command]:
        return self.do(self.session.need(job, self.now))

    def deploy(self, deployment: Deployment = OWN) -> list[Command]:
        return self.do(self.session.deploy(deployment, self.now))

    def wait(self, seconds: float) -> list[Command]:
        """Time passes, and the session is called at each of its deadlines."""
        end, commands = self.now + seconds, []
        while (deadline := self.session.deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            commands += self.do(self.session.tick(self.now))
        self.now, self.last = end, commands
        return commands

    def follow(self, *instances: dict[str, Any], job: str = wire.JOB) -> None:
        """An interest in a job, fresh."""
        self.need(job)
        self.answer(*(instances or (wire.instance(),)), job=job)


def said(commands: list[Command], kind: str) -> list[Any]:
    """The payloads of one kind of message."""
    topic = wire.topic(kind)
    return [json.loads(it.payload) for it in commands if isinstance(it, Publish) and it.topic == topic]


def queries(commands: list[Command]) -> list[str]:
    """The keys that were asked for."""
    return [it["sname"] or it["sip"] for it in said(commands, "tablequery/request")]


def subscribed(commands: list[Command]) -> list[str]:
    return [topic for it in commands if isinstance(it, Subscribe) for topic in it.topics]


def unsubscribed(commands: list[Command]) -> list[str]:
    return [topic for it in commands if isinstance(it, Unsubscribe) for topic in it.topics]


def answers(commands: list[Command]) -> list[tuple[str, bool]]:
    """Who may go on, and with what."""
    return [(it.key, it.found) for it in commands if isinstance(it, Answered)]


def changed(commands: list[Command]) -> set[str]:
    return {job for it in commands if isinstance(it, Changed) for job in it.jobs}
