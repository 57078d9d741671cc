"""Which nodes may send what, and where senders were last heard from.

An open decapsulator lets anybody speak for anybody (CVE-2020-10136, CVE-2025-23018). So the node that sent a datagram
must be where the tables have the inner source; all others must at least be nodes of the cluster, and a source that no
table has must be an address of the overlay, and neither a ServiceIP nor ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from tests.oracle import model
from tests.oracle.model import Address, Host, Service, World
from tests.oracle.packet import require

REMEMBERED = 300 * 1_000_000_000
OVERHEAD = {4: 20 + 8, 6: 40 + 8}  # IP and UDP headers of the underlay


def wire_name(host: Host) -> Address:
    """The address under which a container appears to others: its instance IP, or its own if it has none."""
    return ip_address(host.instance_ip or host.address)


def hosted(address: Address, hosts: Mapping[Address, Host], services: Mapping[Address, Service]) -> Host | None:
    """The container that has this namespace address or, by the service table, this instance IP."""
    if address in hosts:
        return hosts[address]
    service = services.get(address)
    if service is None or service.policy != "instance" or not service.backends:
        return None
    return hosts.get(ip_address(service.backends[0]))


@dataclass(frozen=True)
class Heard:
    """Where a sender was heard from; `ours`: the node runs this appliance too."""

    node: Address
    port: int
    ours: bool
    until: int


class Peers:
    """What one node knows of the others."""

    def __init__(self, world: World) -> None:
        self._heard: dict[Address, Heard] = {}
        self.learn(world)

    def learn(self, world: World) -> None:
        """The tables are these from now on."""
        self._world = world
        self._hosts = {ip_address(host.address): host for host in world.hosts}
        self._services = {ip_address(service.address): service for service in world.services}
        self._ours = {ip_address(node.address): node for node in world.nodes}
        ports = {host.node: host.port for host in world.hosts} | {node.address: node.port for node in world.nodes}
        self._ports = {ip_address(node): port for node, port in ports.items() if node != world.node}

    def path_mtu(self, node: Address) -> int | None:
        """The largest packet that fits a datagram to a node; None: any."""
        known = self._ours.get(node) if node in self._ports else None
        return known.mtu - OVERHEAD[node.version] if known and known.mtu else None

    def heard_from(self, sender: Address, now: int) -> Heard | None:
        """Where a sender was heard from lately."""
        heard = self._heard.get(sender)
        return heard if heard and heard.until > now else None

    def believe(self, outer: tuple[str, int], source: Address, now: int) -> None:
        """DropError unless the node may speak for this source; if it may, that is remembered."""
        node = ip_address(outer[0])
        host = hosted(source, self._hosts, self._services)
        if host is not None and ip_address(host.node) == node and not self._is_here(host):
            port = host.port
        else:
            require(node in self._ports or self._world.learn_hosts == model.ANY, model.UNKNOWN_PEER)
            require(host is None and self._is_free(source), model.PEER_SPOOF)
            port = self._ports.get(node, self._world.port)
        self._heard[source] = Heard(node, port, node in self._ports and node in self._ours, now + REMEMBERED)

    def _is_here(self, host: Host) -> bool:
        return (ip_address(host.node), host.port) == (ip_address(self._world.node), self._world.port)

    def _is_free(self, source: Address) -> bool:
        """Whether a source that no table has may be somebody's container."""
        in_overlay = any(source in ip_network(text) for text in self._world.overlay)
        ours = source in self._services or str(source) in self._world.gateways
        return self._world.learn_hosts != model.OFF and in_overlay and not ours
