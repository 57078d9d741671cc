"""Kernel VXLAN, routed: the containers' subnets are reached through a VXLAN device with a static peer.

This is how flannel sets it up, and the nearest the kernel has to the appliance: the same bridges, the same
routing steps on each node, one UDP encapsulation in between. It balances nothing and rewrites nothing."""

from appliance.lab.plan import Node
from perf import net, topology
from perf.systems.system import System
from perf.topology import INNER_MTU, PAIRS, Path, Subnet

PORT = 4789
"""IANA's port for VXLAN (RFC 7348)."""


class Vxlan(System):
    """Containers' subnets routed over a VXLAN device between the nodes."""

    name = "vxlan"
    sentence = "kernel VXLAN, routed, static peers: the yardstick"
    number = 92
    """Of the system's addresses, and its VXLAN network identifier."""

    def set_up(self) -> Path:
        """Bridge, container, VXLAN device and routes on each node. Raises NetError."""
        path = topology.join(self.name, self.number)
        for node, other in PAIRS:
            self._tunnel(node, other)
        return path

    def _tunnel(self, node: Node, other: Node) -> None:
        """The VXLAN device of a node, its one peer, and the routes to the peer's containers."""
        device = f"vx{self.number}"
        own, peer = Subnet(self.number, 0).host(node.number), Subnet(self.number, 0).host(other.number)
        own_mac, peer_mac = (f"02:00:00:00:{self.number}:{it.number:02x}" for it in (node, other))
        tunnel = f"id {self.number} local {node.underlay_v4} dstport {PORT} nolearning"
        net.ip(
            node.namespace,
            f"""
            link add name {device} address {own_mac} mtu {INNER_MTU} up type vxlan {tunnel}
            addr add {own[0]} dev {device}
            addr add {own[1]} dev {device} nodad
            """
            + "".join(
                f"""
                neigh add {topology.bare(gateway)} lladdr {peer_mac} dev {device} nud permanent
                route add {prefix} via {topology.bare(gateway)} dev {device}
                """
                for gateway, prefix in zip(peer, Subnet(self.number, other.number).prefixes, strict=True)
            ),
        )
        entry = f"fdb add {peer_mac} dev {device} dst {other.underlay_v4} self permanent"
        net.run("bridge", "-n", node.namespace, *entry.split())
