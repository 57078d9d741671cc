"""Plain routing between the nodes: each routes the other's containers over the underlay. The ceiling."""

from appliance.lab.plan import Node
from perf import net, topology
from perf.systems.system import System
from perf.topology import PAIRS, Path, Subnet

NUMBER = 91
"""Of the system's addresses."""


class Direct(System):
    """Containers' subnets routed by the nodes, with no tunnel."""

    name = "direct"
    sentence = "plain routing, no tunnel: the ceiling"

    def set_up(self) -> Path:
        """Bridge, container and routes to the other node's subnet on each node. Raises NetError."""
        path = topology.join(self.name, NUMBER)
        for node, other in PAIRS:
            self._route(node, other)
        return path

    @staticmethod
    def _route(node: Node, other: Node) -> None:
        v4, v6 = Subnet(NUMBER, other.number).prefixes
        net.ip(
            node.namespace,
            f"""
            route add {v4} via {other.underlay_v4}
            route add {v6} via {other.underlay_v6}
            """,
        )
