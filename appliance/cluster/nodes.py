"""The cluster's list of nodes, as this node has heard it. No input or output.

*Owned* by the session. A manager of ours retains one message a node, and an empty one for a node that is gone. What was
removed while there was no connection is not told afterwards: so a connection begins with all nodes in doubt, and those
that are not heard of again within ``SETTLE`` seconds are dropped. An existing manager has no such list: it stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from appliance.cluster.messages import ClusterNode

SETTLE: Final = 30.0
"""Seconds after a connection's begin in which the broker delivers what is retained: much more than 5,000 nodes take."""


class NodeList:
    """See the module."""

    def __init__(self) -> None:
        self._nodes: dict[str, ClusterNode] = {}
        self._doubted: set[str] = set()

    @property
    def nodes(self) -> Mapping[str, ClusterNode]:
        """Nodes by their id."""
        return self._nodes

    def put(self, name: str, node: ClusterNode | None) -> frozenset[str]:
        """A node is there, or gone (None); gives those that are different now."""
        self._doubted.discard(name)
        if self._nodes.get(name) == node:
            return frozenset()
        if node is None:
            del self._nodes[name]
        else:
            self._nodes[name] = node
        return frozenset((name,))

    def doubt(self) -> None:
        """A connection begins."""
        self._doubted = set(self._nodes)

    def settle(self) -> frozenset[str]:
        """Drops those that are still in doubt, and gives them."""
        gone, self._doubted = frozenset(self._doubted), set()
        for name in gone:
            del self._nodes[name]
        return gone
