"""Two nodes of a cluster: a client on the second calls services on the first.

Services are deployed by the tests, each with a ServiceIP of its own, so that the second node knows none of them.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.environment.netns import Netns
from tests.manager.processes import Manager
from tests.supervisor.world import Node, World, ready, until

ONE, TWO = "65f0000000000000000000a1", "65f0000000000000000000b2"
METRICS_PORT = 9109
CLIENTS = "app.ns.client.test"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Service:
    """A service with one instance, on the first node."""

    job: str
    address: str
    container: Netns
    namespace_ip: str


@dataclass
class Pair:
    """See the module."""

    world: World
    manager: Manager
    one: Node
    two: Node
    client: Netns

    @contextmanager
    def service(self) -> Iterator[Service]:
        """A new service that runs, and that the client's node has not heard of."""
        number = next(_numbers)
        job, address, container = f"app.ns.web{number}.test", f"10.30.40.{number}", self.world.container()
        self.manager.deploy(job, 1, service_ips={"rr": {"v4": address}})
        attached = self.one.api.attach(job, 0, {"netns": container.name})
        until(lambda: self.is_up(job), f"{job} is announced")
        assert address not in {it["address"] for it in self.two.api.services()}
        try:
            yield Service(job, address, container, attached["address_v4"])
        finally:
            if any(it["service"] == job for it in self.one.api.attachments()):
                self.one.api.detach(job, 0)

    @contextmanager
    def closest(self) -> Iterator[str]:
        """The ServiceIP of a new service of policy closest, with its only instance on the first node."""
        number = next(_numbers)
        job, address, container = f"app.ns.near{number}.test", f"10.30.41.{number}", self.world.container()
        self.manager.deploy(job, 1, service_ips={"closest": {"v4": address}})
        self.one.api.attach(job, 0, {"netns": container.name})
        until(lambda: self.is_up(job), f"{job} is announced")
        try:
            yield address
        finally:
            self.one.api.detach(job, 0)

    @contextmanager
    def without_cluster(self) -> Iterator[None]:
        """Manager and broker have ended, and both nodes know."""
        self.manager.process.stop()
        until(lambda: self._connected() == [False, False], "both nodes have lost the broker")
        try:
            yield
        finally:
            self.manager = self.world.manager()
            until(lambda: self._connected() == [True, True], "both nodes are back")

    def _connected(self) -> list[bool]:
        return [node.api.cluster()["connected"] for node in (self.one, self.two)]

    def is_up(self, job: str) -> bool:
        """Whether the cluster has a job's only instance."""
        return bool(self.manager.service(job)["instances"][0]["status"] == "up")


def pair_on(world: World) -> Pair:
    """Both nodes are members, the client is attached."""
    manager = world.manager()
    manager.deploy(CLIENTS, 1)
    metrics = {"port": METRICS_PORT, "address": "0.0.0.0"}
    one, two = world.member(ONE, metrics=metrics), world.member(TWO, cluster={"interest": 60}, metrics=metrics)
    for node in (one, two):
        node.start()
        ready(node)
    client = world.container()
    two.api.attach(CLIENTS, 0, {"netns": client.name})
    made = Pair(world, manager, one, two, client)
    until(lambda: made.is_up(CLIENTS), "the client is announced")
    until(lambda: one.api.cluster()["nodes"] == two.api.cluster()["nodes"] == 1, "the nodes know each other")
    return made
