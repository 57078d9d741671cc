"""Nebula (Slack): certificates of one authority, encrypts; the other node's containers are an unsafe route. IPv4
only."""

from typing import ClassVar

from appliance.lab.plan import Node
from perf import net, topology
from perf.systems.overlay import Overlay
from perf.topology import PAIRS, PLAN, Subnet

CONFIG = """
pki: {{ca: {files}/ca.crt, cert: {files}/node.crt, key: {files}/node.key}}
static_host_map: {{"{peer}": ["{peer_underlay}:{port}"]}}
lighthouse: {{am_lighthouse: false, hosts: []}}
listen: {{host: "{underlay}", port: {port}}}
punchy: {{punch: false}}
tun:
  dev: {device}
  mtu: {mtu}
  unsafe_routes: [{{route: "{route}", via: "{peer}"}}]
firewall:
  outbound: [{{port: any, proto: any, host: any}}]
  inbound: [{{port: any, proto: any, host: any}}]
"""


class Nebula(Overlay):
    """One certificate authority, two nodes."""

    name = "nebula"
    sentence = "Nebula: a userspace overlay in Go, encrypts"
    number = 94
    mtu = 1440
    v6 = False
    programs: ClassVar = {"nebula": "nebula", "nebula-cert": "nebula"}

    def prepare(self) -> None:
        """A certificate for each node, which may speak for its containers' subnet."""
        authority = self.files(PLAN.nodes[0])
        sign = ("-ca-crt", f"{authority}/ca.crt", "-ca-key", f"{authority}/ca.key")
        net.run(
            *(
                "nebula-cert",
                "ca",
                "-name",
                "perf",
                "-out-crt",
                f"{authority}/ca.crt",
                "-out-key",
                f"{authority}/ca.key",
            )
        )
        for node, other in PAIRS:
            files = self.files(node)
            if files != authority:
                (files / "ca.crt").write_bytes((authority / "ca.crt").read_bytes())
            net.run(
                *("nebula-cert", "sign", "-name", node.name, "-ip", Subnet(self.number, 0).host(node.number)[0]),
                *("-subnets", Subnet(self.number, node.number).prefixes[0]),
                *sign,
                *("-out-crt", f"{files}/node.crt", "-out-key", f"{files}/node.key"),
            )
            (files / "config.yml").write_text(self._config(node, other))

    def _config(self, node: Node, other: Node) -> str:
        return CONFIG.format(
            files=self.files(node),
            peer=topology.bare(Subnet(self.number, 0).host(other.number)[0]),
            peer_underlay=other.underlay_v4,
            underlay=node.underlay_v4,
            port=self.port,
            device=self.device(node),
            mtu=self.mtu,
            route=Subnet(self.number, other.number).prefixes[0],
        )

    def addresses(self, node: Node) -> tuple[str, ...]:
        """It sets its own."""
        return ()

    def command(self, node: Node) -> list[str]:
        """Nebula stays in the foreground."""
        return ["nebula", "-config", str(self.files(node) / "config.yml")]
