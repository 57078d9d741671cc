"""A lab's cluster, asked from outside: what is deployed, what runs where, with which addresses.

The manager listens on the loopback of the cluster's namespace, so each request is made there (`network.inside`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar

from appliance.client import ApiError
from appliance.cluster.manager.client import ManagerClient
from appliance.cluster.manager.descriptor import Descriptor
from appliance.lab import network
from appliance.lab.plan import REST_PORT, Container, Host, Node

T = TypeVar("T")

TIMEOUT_S = 15.0
"""A manager whose broker is away answers after 8 s, that it is."""


@dataclass(frozen=True)
class Placed:
    """Addresses of an instance; None where it has none, or is not known yet."""

    instance_v4: str | None = None
    instance_v6: str | None = None
    address_v4: str | None = None
    address_v6: str | None = None
    status: str = "unknown"


@dataclass(frozen=True)
class Picture:
    """What the cluster knew at one moment."""

    services: list[dict[str, Any]]
    nodes: list[dict[str, Any]]

    def service(self, name: str) -> dict[str, Any]:
        """A service as the manager shows it; empty if there is none."""
        return next((it for it in self.services if it["name"] == name), {})

    def placed(self, container: Container) -> Placed:
        """A container's addresses."""
        instances = self.service(container.service).get("instances", [])
        found: dict[str, Any] = next((it for it in instances if it["number"] == container.instance), {})
        return Placed(
            instance_v4=found.get("v4"),
            instance_v6=found.get("v6"),
            address_v4=found.get("address_v4"),
            address_v6=found.get("address_v6"),
            status=found.get("status", "none"),
        )

    def is_up(self, container: Container) -> bool:
        """Whether the cluster sends calls to a container."""
        return self.placed(container).status == "up"

    def node(self, node: Node) -> dict[str, Any]:
        """A node as the manager shows it; empty if it never heard of it."""
        return next((it for it in self.nodes if it["id"] == node.id), {})


NOTHING = Picture([], [])


class Manager:
    """The cluster service manager of a lab. Each method raises ApiError."""

    def __init__(self, cluster: Host) -> None:
        self._namespace = cluster.namespace
        self._client = ManagerClient(f"http://127.0.0.1:{REST_PORT}", TIMEOUT_S)

    def deploy(self, descriptors: Iterable[Descriptor]) -> None:
        """Makes services what their descriptors say, as `appliance deploy` does."""
        wanted = list(descriptors)
        self._ask(lambda: [self._client.deploy(it) for it in wanted])

    def undeploy(self, job: str) -> None:
        """Takes a service out of the cluster, as `appliance undeploy` does."""
        self._ask(lambda: self._client.undeploy(job))

    def picture(self) -> Picture:
        """What the cluster knows now."""
        return self._ask(lambda: Picture(self._client.services(), self._client.nodes()))

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return network.inside(self._namespace, question)
        except (OSError, HTTPException) as error:
            raise ApiError(f"no way into {self._namespace}: {error}") from error
