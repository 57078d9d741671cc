"""wireguard-go: WireGuard in userspace, in the version that the distribution has; encrypts."""

from typing import ClassVar

from appliance.lab.plan import Node
from perf import net
from perf.systems.overlay import Overlay
from perf.topology import PLAN, Subnet


class WireguardGo(Overlay):
    """One peer on each node, allowed its containers' subnets."""

    name = "wireguard-go"
    sentence = "WireGuard in userspace, in Go, encrypts"
    number = 95
    mtu = 1440
    programs: ClassVar = {"wireguard-go": "wireguard-go", "wg": "wireguard-tools"}

    def prepare(self) -> None:
        """A key pair for each node."""
        for node in PLAN.nodes:
            private = net.run("wg", "genkey")
            (self.files(node) / "private").write_text(private)
            (self.files(node) / "public").write_text(net.run("wg", "pubkey", stdin=private))

    def command(self, node: Node) -> list[str]:
        """In the foreground."""
        return ["wireguard-go", "-f", self.device(node)]

    def configure(self, node: Node, other: Node) -> None:
        """The peer, by the control socket."""
        allowed = ",".join((*Subnet(self.number, other.number).prefixes, *Subnet(self.number, 0).prefixes))
        net.run(
            *(
                "wg",
                "set",
                self.device(node),
                "listen-port",
                str(self.port),
                "private-key",
                f"{self.files(node)}/private",
            ),
            *("peer", (self.files(other) / "public").read_text().strip(), "allowed-ips", allowed),
            *("endpoint", f"{other.underlay_v4}:{self.port}"),
        )
