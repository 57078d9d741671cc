"""Kernel VXLAN with a service address by nftables, as kube-proxy makes it: what does the same work as the appliance.

The rules have the shape of kube-proxy's nftables mode: one map from address, protocol and port to a service's chain,
which draws an endpoint at random and rewrites the destination; connection tracking translates the answers. They exist
only while this system is measured: their hooks track every packet that a node forwards, of the other systems too."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

from perf import net, topology
from perf.load import ports
from perf.systems.vxlan import Vxlan
from perf.topology import CLIENT_NODE, SERVER_NODE, Path, Subnet

VIP_V4, VIP_V6 = "10.96.0.93", "2001:db8:96::93"
TABLE = "perf-vip"


class VxlanVip(Vxlan):
    """The server is dialled by an address that the client's node translates."""

    name = "vxlan-vip"
    sentence = "kernel VXLAN, and a service address by nftables as kube-proxy makes it"
    number = 93
    programs: ClassVar = {"nft": "nftables"}

    def set_up(self) -> Path:
        """As VXLAN; the client dials the service's address."""
        return replace(super().set_up(), address_v4=VIP_V4, address_v6=VIP_V6)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The rules on the client's node."""
        v4, v6 = map(topology.bare, Subnet(self.number, SERVER_NODE.number).host(2))
        self._nft(rules(v4, v6))
        try:
            yield
        finally:
            self._nft(f"delete table inet {TABLE}")

    @staticmethod
    def _nft(script: str) -> None:
        net.run("ip", "netns", "exec", CLIENT_NODE.namespace, "nft", "-f", "-", stdin=script)


def rules(v4: str, v6: str) -> str:
    """The table for nft(8): every port of the loads, to one endpoint in each family."""
    services = [(protocol, port) for protocol in ("tcp", "udp") for port in ports.ALL]
    maps, chains = "", ""
    for family, name, vip, endpoint in (("ip", "four", VIP_V4, v4), ("ip6", "six", VIP_V6, v6)):
        elements = ", ".join(f"{vip} . {protocol} . {port} : goto {name}-service" for protocol, port in services)
        kind = "ipv4_addr" if family == "ip" else "ipv6_addr"
        maps += f"""
        map {name}-services {{
            type {kind} . inet_proto . inet_service : verdict
            elements = {{ {elements} }}
        }}"""
        chains += f"""
        chain {name}-endpoint {{
            dnat {family} to {endpoint}
        }}
        chain {name}-service {{
            numgen random mod 1 vmap {{ 0 : goto {name}-endpoint }}
        }}"""
    return f"""
    table inet {TABLE} {{{chains}{maps}
        chain services {{
            type nat hook prerouting priority dstnat
            ip daddr . meta l4proto . th dport vmap @four-services
            ip6 daddr . meta l4proto . th dport vmap @six-services
        }}
    }}"""
