"""Topics of the cluster's broker: who publishes what, about which node or job.

A node publishes below its own ``nodes/<id>/net/`` and reads the results there, and the notices of jobs that it is
interested in. ``service/undeployed`` and ``status`` are additions: existing managers ignore them.

Whoever publishes below ``nodes/`` sends JSON objects only, and never an empty message, not even to clear a retained
one: existing managers stop listening at the first one that they cannot parse.
"""

from __future__ import annotations

from typing import Final

SUBNET: Final = "subnet"
SUBNETWORK_RESULT: Final = "subnetwork/result"
QUERY: Final = "tablequery/request"
QUERY_RESULT: Final = "tablequery/result"
INTEREST_REMOVE: Final = "interest/remove"
DEPLOYED: Final = "service/deployed"
UNDEPLOYED: Final = "service/undeployed"
ADDRESS_CHANGED: Final = "service/address-changed"
STATUS: Final = "status"
"""Retained: ``{"status": "online"}`` and where the node is reached, or ``offline``, which is also the last will."""


NODES: Final = "cluster/nodes/"
"""Prefix of what a manager of ours retains of each node; existing managers have no such topic."""
ALL_NODES: Final = f"{NODES}+"


EXPOSED: Final = "cluster/exposed/"
"""Prefix of what a manager of ours retains of each job that nodes open ports for: on which nodes."""
ALL_EXPOSED: Final = f"{EXPOSED}+"
HEALTH: Final = "service/health"
"""Whether an instance works, as the node that hosts it finds."""
INGRESS_APP: Final = "appliance"


def ingress_job(node: str) -> str:
    """The job whose only instance is a node itself: in its name, what comes in through its ports enters the overlay."""
    return f"{INGRESS_APP}.node.{node}.ingress"


def of_node(node: str, kind: str) -> str:
    """The topic of one kind of message from or to a node."""
    return f"nodes/{node}/net/{kind}"


def updates(job: str) -> str:
    """The topic that says that something about a job changed."""
    return f"jobs/{job}/updates_available"
