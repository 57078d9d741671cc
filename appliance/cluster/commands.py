"""What a session wants done: the first three by the transport, the others by the member."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.cluster.checks import Subnetwork


@dataclass(frozen=True)
class Publish:
    """To be published with QoS 1; ``token`` is reported to ``delivered`` once the broker has it."""

    topic: str
    payload: bytes
    retain: bool = False
    token: tuple[str, int] | None = None


@dataclass(frozen=True)
class Subscribe:
    """To be subscribed to, before whatever is published next."""

    topics: tuple[str, ...]


@dataclass(frozen=True)
class Unsubscribe:
    """Not to be received any more."""

    topics: tuple[str, ...]


@dataclass(frozen=True)
class Changed:
    """These jobs look different now (``Session.jobs``)."""

    jobs: frozenset[str]


@dataclass(frozen=True)
class NodesChanged:
    """These nodes of the cluster are other ones now, or gone (``Session.nodes``)."""

    nodes: frozenset[str]


@dataclass(frozen=True)
class Flush:
    """What has changed until here is to be in the tables before what follows is said."""


@dataclass(frozen=True)
class Answered:
    """Whoever waits for a key may go on; ``found``: the cluster has instances of it, and they are known now."""

    key: str
    found: bool


@dataclass(frozen=True)
class Assigned:
    """The node's subnets."""

    subnetwork: Subnetwork


@dataclass(frozen=True)
class Refused:
    """A message that was not taken, and why."""

    topic: str
    reason: str


Transmission = Publish | Subscribe | Unsubscribe
Command = Transmission | Changed | NodesChanged | Flush | Answered | Assigned | Refused
