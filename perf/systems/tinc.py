"""tinc: a userspace overlay in C, router mode, encrypts with its defaults (version 1.0: Blowfish, HMAC-SHA1)."""

from typing import ClassVar

from appliance.lab.plan import Node
from perf import net
from perf.systems.overlay import Overlay
from perf.topology import PAIRS, Subnet


class Tinc(Overlay):
    """Two daemons that know each other's key and subnets."""

    name = "tinc"
    sentence = "tinc: a userspace overlay in C, encrypts"
    number = 96
    mtu = 1400
    programs: ClassVar = {"tincd": "tinc"}

    def prepare(self) -> None:
        """Keys, and each node's description on both."""
        for node, other in PAIRS:
            hosts = self.files(node) / "hosts"
            hosts.mkdir(exist_ok=True)
            (self.files(node) / "tinc.conf").write_text(
                f"Name = {node.name}\nConnectTo = {other.name}\nMode = router\nDeviceType = tun\n"
                f"Interface = {self.device(node)}\nBindToAddress = {node.underlay_v4} {self.port}\nAutoConnect = no\n"
            )
            subnets = "".join(f"Subnet = {it}\n" for it in Subnet(self.number, node.number).prefixes)
            (hosts / node.name).write_text(f"Address = {node.underlay_v4}\nPort = {self.port}\n{subnets}")
            net.run("tincd", "-c", str(self.files(node)), "-K2048", stdin="\n\n")
        for node, other in PAIRS:
            (self.files(node) / "hosts" / other.name).write_text((self.files(other) / "hosts" / other.name).read_text())

    def command(self, node: Node) -> list[str]:
        """In the foreground."""
        files = self.files(node)
        return ["tincd", "-c", str(files), "-D", f"--pidfile={files}/tinc.run"]
