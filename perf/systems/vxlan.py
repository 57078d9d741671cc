"""Kernel VXLAN, routed: the containers' subnets are reached through a VXLAN device with a static peer.

This is how flannel sets it up, and the nearest the kernel has to the appliance: the same bridges, the same
routing steps on each node, one UDP encapsulation in between. It balances nothing and rewrites nothing."""

from typing import Any

from appliance.lab.plan import Node
from perf import net, topology
from perf.systems.system import Process
from perf.topology import INNER_MTU, PAIRS, Path, Subnet

NUMBER = 92
"""Of the system's addresses, and its VXLAN network identifier."""
PORT = 4789
"""IANA's port for VXLAN (RFC 7348)."""
DEVICE = "vx0"


class Vxlan:
    """Containers' subnets routed over a VXLAN device between the nodes."""

    name = "vxlan"
    sentence = "kernel VXLAN, routed, static peers: the yardstick"

    def set_up(self) -> Path:
        """Bridge, container, VXLAN device and routes on each node. Raises NetError."""
        path = topology.join(self.name, NUMBER)
        for node, other in PAIRS:
            self._tunnel(node, other)
        return path

    @staticmethod
    def _tunnel(node: Node, other: Node) -> None:
        """The VXLAN device of a node, its one peer, and the routes to the peer's containers."""
        own, peer = Subnet(NUMBER, 0).host(node.number), Subnet(NUMBER, 0).host(other.number)
        own_mac, peer_mac = f"02:00:00:00:00:{node.number:02x}", f"02:00:00:00:00:{other.number:02x}"
        tunnel = f"id {NUMBER} local {node.underlay_v4} dstport {PORT} nolearning"
        net.ip(
            node.namespace,
            f"""
            link add name {DEVICE} address {own_mac} mtu {INNER_MTU} up type vxlan {tunnel}
            addr add {own[0]} dev {DEVICE}
            addr add {own[1]} dev {DEVICE} nodad
            """
            + "".join(
                f"""
                neigh add {topology.bare(gateway)} lladdr {peer_mac} dev {DEVICE} nud permanent
                route add {prefix} via {topology.bare(gateway)} dev {DEVICE}
                """
                for gateway, prefix in zip(peer, Subnet(NUMBER, other.number).prefixes, strict=True)
            ),
        )
        entry = f"fdb add {peer_mac} dev {DEVICE} dst {other.underlay_v4} self permanent"
        net.run("bridge", "-n", node.namespace, *entry.split())

    def processes(self) -> list[Process]:
        """None: the kernel encapsulates."""
        return []

    def describe(self) -> dict[str, Any]:
        """Nothing varies."""
        return {}
