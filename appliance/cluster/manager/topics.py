"""MQTT topics and the NATS subjects as which nats-server shows them.

A topic's levels are a subject's tokens. Since ``.`` separates tokens, a dot inside a level is written ``//``, and a
level that is empty is written ``/``. A test compares both directions with the real server.
"""

from __future__ import annotations

REQUEST_TOPICS = (
    "nodes/+/net/subnet",
    "nodes/+/net/service/deployed",
    "nodes/+/net/service/undeployed",
    "nodes/+/net/service/address-changed",
    "nodes/+/net/tablequery/request",
    "nodes/+/net/interest/remove",
    "nodes/+/net/status",
    "nodes/+/net/service/health",
)
"""What nodes publish for us. Answers share the prefix ``nodes/``, so a wildcard for all would catch those too."""


LISTED = "cluster/nodes/"
ALL_NODES = f"{LISTED}+"
"""The list of nodes. Only managers publish there."""
EXPOSED = "cluster/exposed/"
ALL_EXPOSED = f"{EXPOSED}+"
"""Which nodes have ports for which jobs. Only managers publish there."""


def to_subject(topic: str) -> str:
    """The NATS subject of an MQTT topic without wildcards."""
    return ".".join(level.replace(".", "//") or "/" for level in topic.split("/"))


def to_topic(subject: str) -> str:
    """The MQTT topic of a NATS subject."""
    return "/".join("" if token == "/" else token.replace("//", ".") for token in subject.split("."))


def to_filter(topic_filter: str) -> str:
    """The NATS subject filter of an MQTT filter whose wildcards are whole ``+`` levels."""
    return ".".join("*" if level == "+" else to_subject(level) for level in topic_filter.split("/"))


def subnet_result(node: str) -> str:
    """Where a node hears which subnets it got."""
    return f"nodes/{node}/net/subnetwork/result"


def query_result(node: str) -> str:
    """Where a node hears the answers to its table queries."""
    return f"nodes/{node}/net/tablequery/result"


def listed(node: str) -> str:
    """Where the list says where a node is reached."""
    return f"{LISTED}{node}"


def exposed(job: str) -> str:
    """Where all nodes hear which of them have ports for a job."""
    return f"{EXPOSED}{job}"


def updates(job: str) -> str:
    """Where everybody who is interested in a job hears that it changed."""
    return f"jobs/{job}/updates_available"
