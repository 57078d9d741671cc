"""OpenVPN, one peer on each side, TLS with certificates known by their fingerprint, AES-256-GCM, in userspace."""

from typing import ClassVar

from appliance.lab.plan import Node
from perf import net, topology
from perf.systems.overlay import Overlay
from perf.topology import PAIRS, PLAN, SERVER_NODE, Subnet


class Openvpn(Overlay):
    """A tunnel of two ends."""

    name = "openvpn"
    sentence = "OpenVPN in userspace, encrypts"
    number = 97
    mtu = 1400
    programs: ClassVar = {"openvpn": "openvpn", "openssl": "openssl"}

    def prepare(self) -> None:
        """A certificate for each node, and its fingerprint for the other."""
        for node in PLAN.nodes:
            files = self.files(node)
            net.run(
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-subj", f"/CN={node.name}", "-days", "2", "-keyout", f"{files}/key", "-out", f"{files}/cert"),
            )
        for node, other in PAIRS:
            (self.files(node) / "openvpn.conf").write_text(self._config(node, other))

    def _config(self, node: Node, other: Node) -> str:
        files, role = self.files(node), "tls-server" if node is SERVER_NODE else "tls-client"
        own, peer = (topology.bare(Subnet(self.number, 0).host(it.number)[0]) for it in (node, other))
        fingerprint = net.run(
            "openssl", "x509", "-fingerprint", "-sha256", "-noout", "-in", f"{self.files(other)}/cert"
        ).rpartition("=")[2]
        return f"""
        dev {self.device(node)}
        dev-type tun
        proto udp4
        local {node.underlay_v4}
        lport {self.port}
        remote {other.underlay_v4} {self.port}
        {role}
        dh none
        cert {files}/cert
        key {files}/key
        peer-fingerprint {fingerprint.strip()}
        data-ciphers AES-256-GCM
        tun-mtu {self.mtu}
        mssfix 0
        ifconfig {own} {peer}
        disable-dco
        """

    def addresses(self, node: Node) -> tuple[str, ...]:
        """It sets the IPv4 address; the other is added."""
        return Subnet(self.number, 0).host(node.number)[1:]

    def command(self, node: Node) -> list[str]:
        """It stays in the foreground."""
        return ["openvpn", "--config", str(self.files(node) / "openvpn.conf")]
