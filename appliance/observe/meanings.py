"""What each reason for a drop means, and what to look at: one sentence each, for the tools and the documentation.

By the reasons' names, and not in ``counters``: that source is part of the packet path's compiled code, where a better
sentence would cost a compilation, and imports what the command line has no use for. A test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

DIRECTIONS: Final = {"tun": "from containers", "wire": "from other nodes"}

SENTENCES: Final[Mapping[str, str]] = {
    "malformed": "Lengths or checksums in the packet do not add up.",
    "fragment": "A fragment overlaps another, or there are too many of them; better to send smaller datagrams.",
    "unsupported-protocol": "Router advertisements and the like, which belong to no flow.",
    "spoofed-source": "A container uses an address that was not given to it, or the tables have no local entry for "
    "it.",
    "no-route": "The destination is neither a ServiceIP nor a known namespace address.",
    "unknown-service": "The destination is in network.services, but no job has it.",
    "no-instance": "The job has no instance that is up, or none that the host table knows.",
    "reverse-in-use": "The container has the same port pair open to one instance through two of its addresses: "
    "answers could not be told apart.",
    "not-local": "Another node believes an instance to be here: its tables are older than this node's.",
    "flow-table-full": "Every flow record is in use by an active TCP connection; raise workers.flows.",
    "send-failed": "The node's own kernel refused to send: memory, or a link that is down.",
    "tun-write-failed": "The node's own kernel refused the packet at the TUN device: down, or short of memory.",
    "fragment-timeout": "The other fragments of the datagram did not come within 2 s.",
    "unknown-peer": "A packet on tunnel.port from an address that is no node of the cluster.",
    "peer-spoof": "A node sent for a container that is elsewhere: tables that differ for a moment, or an attack.",
    "nested-overlay": "A packet of the tunnel inside the tunnel, which no container asked for.",
    "icmp-no-flow": "An ICMP error about no live flow: of a connection that is over, or forged.",
    "too-big": "Larger than the path to the node takes; the sender was told the right size.",
}


def sentence(label: str) -> str:
    """What a reason means, by its name in tools; empty if this version does not know it."""
    return SENTENCES.get(label, "")


def totals(workers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Drops of all workers (as ``status`` has them), most first: direction, reason, count and sentence."""
    summed: dict[tuple[str, str], int] = {}
    for worker in workers:
        for direction, reasons in worker["drops"].items():
            for reason, count in reasons.items():
                summed[direction, reason] = summed.get((direction, reason), 0) + count
    return [
        {"direction": direction, "reason": reason, "packets": count, "meaning": sentence(reason)}
        for (direction, reason), count in sorted(summed.items(), key=lambda it: (-it[1], it[0]))
    ]
