"""What stands for Docker: libnetwork's side of the plugin protocol, and what it does to a link in a sandbox."""

import http.client
import json
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.runtimes.local import request
from tests.environment.netns import Netns
from tests.supervisor.world import Node, until

NETWORK, ENDPOINT = "a1" * 32, "e5" * 32


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=15)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


@dataclass
class Libnetwork:
    """A client of the plugin's socket, on a node."""

    node: Node

    def post(self, method: str, body: object = None, raw: bytes | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a method's answer."""
        connection = _Connection(self.node.docker)
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/vnd.docker.plugins.v1.2+json"}
        connection.request("POST", f"/{method}", data, headers)
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("application/vnd.docker.plugins.v1.1+json")
        said = json.loads(answer.read())
        connection.close()
        return answer.status, said

    def call(self, method: str, body: object = None) -> dict[str, Any]:
        """The answer of a method that succeeds."""
        status, said = self.post(method, body)
        assert (status, said.get("Err")) == (200, None), (method, said)
        return said

    def refused(self, method: str, body: object) -> str:
        """Why a method fails."""
        status, said = self.post(method, body)
        assert status != 200, (method, said)
        assert list(said) == ["Err"]
        return str(said["Err"])

    def create_network(self, **options: str) -> dict[str, Any]:
        """`docker network create -d edge-appliance --ipam-driver edge-appliance -o …`, as Docker makes it."""
        pool = self.call("IpamDriver.RequestPool", {"AddressSpace": "edge-appliance", "Pool": "", "SubPool": "",
                                                    "Options": None, "V6": False})  # fmt: skip
        gateway = self.call("IpamDriver.RequestAddress", {
            "PoolID": pool["PoolID"], "Address": "", "Options": {"RequestAddressType": "com.docker.network.gateway"},
        })  # fmt: skip
        data = {"AddressSpace": "edge-appliance", "Pool": pool["Pool"], "Gateway": gateway["Address"]}
        request = {
            "NetworkID": NETWORK,
            "Options": {"com.docker.network.enable_ipv6": False, "com.docker.network.generic": options},
            "IPv4Data": [data],
            "IPv6Data": None,
        }
        self.call("NetworkDriver.CreateNetwork", request)
        return data

    def create_endpoint(self, endpoint: str = ENDPOINT, **options: str) -> dict[str, Any]:
        """The interface that the driver gives."""
        address = self.call("IpamDriver.RequestAddress", {"PoolID": "edge-appliance/4", "Address": "", "Options": None})
        request = {
            "NetworkID": NETWORK,
            "EndpointID": endpoint,
            "Interface": {"Address": address["Address"], "AddressIPv6": "", "MacAddress": ""},
            "Options": {"com.docker.network.endpoint.exposedports": [], "com.docker.network.portmap": [], **options},
        }
        told = self.call("NetworkDriver.CreateEndpoint", request)["Interface"]
        assert "Address" not in told, "libnetwork refuses what it has asked for before"
        return {"Address": address["Address"], **told}

    def join(self, sandbox: Netns, interface: dict[str, Any], endpoint: str = ENDPOINT) -> dict[str, Any]:
        """Joins, and does in the sandbox what libnetwork does: osl.Namespace.AddInterface, gateway, static routes."""
        key = f"/run/netns/{sandbox.name}"
        said = self.call("NetworkDriver.Join", self.which(endpoint, SandboxKey=key, Options={}))
        link, inside = said["InterfaceName"]["SrcName"], f"{said['InterfaceName']['DstPrefix']}0"
        self.node.namespace.ip("link", "set", link, "netns", sandbox.name, "name", inside)
        sandbox.ip("link", "set", inside, "address", interface["MacAddress"])
        sandbox.set_sysctl(f"net/ipv6/conf/{inside}/disable_ipv6", "0")
        sandbox.ip("addr", "add", interface["Address"], "dev", inside)
        sandbox.ip("addr", "add", interface["AddressIPv6"], "dev", inside, "nodad")
        sandbox.ip("link", "set", inside, "up")
        for gateway in (said["Gateway"], said["GatewayIPv6"]):
            sandbox.ip("route", "add", "default", "via", gateway)
        for route in said["StaticRoutes"]:
            assert route["RouteType"] == 0
            sandbox.ip("route", "add", route["Destination"], "via", route["NextHop"])
        return said

    def leave(self, sandbox: Netns, link: str, endpoint: str = ENDPOINT) -> None:
        """Leaves; libnetwork then moves the link back, and the endpoint goes."""
        self.call("NetworkDriver.Leave", self.which(endpoint))
        sandbox.ip("link", "set", "edge0", "down")
        node = f"/run/netns/{self.node.namespace.name}"
        sandbox.ip("link", "set", "edge0", "netns", node, "name", link)
        self.call("NetworkDriver.DeleteEndpoint", self.which(endpoint))

    def condition(self, service: str) -> str:
        """Of the link of a service's first instance."""
        status, said = request(str(self.node.socket), "GET", f"/v1/attachments/{service}/0")
        assert status == 200, said
        return str(said["condition"])

    def which(self, endpoint: str = ENDPOINT, **more: Any) -> dict[str, Any]:
        """The ids that most requests have."""
        return {"NetworkID": NETWORK, "EndpointID": endpoint, **more}


def lacking() -> str | None:
    """Why no real dockerd can be started here; None if one can."""
    missing = [it for it in ("dockerd", "docker", "containerd", "runc") if shutil.which(it) is None]
    return f"needs {', '.join(missing)} (docker.io)" if missing else None


PREPARE = """
mount --make-rprivate /
umount /sys/fs/cgroup/unified 2> /dev/null
mkdir -p /etc/docker /run/docker
mount -t tmpfs none /etc/docker && mount -t tmpfs none /run/docker && mkdir /etc/docker/plugins
echo "unix://$0" > /etc/docker/plugins/edge-appliance.spec
exec "$@"
"""
"""A directory for plugins and one for namespaces of its own, so that two do not meet; nothing is seen outside."""


@dataclass
class Docker:
    """A real dockerd on a node, without bridge and firewall rules, and its client."""

    node: Node
    directory: Path
    daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> "Docker":
        """Starts it and waits until it answers."""
        self.directory.mkdir(parents=True)
        own = self.directory
        command = ["nsenter", f"--net=/run/netns/{self.node.namespace.name}", "unshare", "--mount"]
        command += ["sh", "-c", PREPARE, str(self.node.docker), "dockerd", "--bridge=none", "--iptables=false"]
        command += ["--ip6tables=false", "--ip-forward=false", "--userland-proxy=false", "--storage-driver", "vfs"]
        command += ["--exec-opt", "native.cgroupdriver=cgroupfs", "--data-root", str(own / "data")]
        command += ["--exec-root", str(own / "exec"), "--pidfile", str(own / "pid"), "--host", f"unix://{own}/sock"]
        with (own / "log").open("wb") as log:
            self.daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        until(self._answers, "dockerd answers", 60)
        return self

    def _answers(self) -> bool:
        assert self.daemon is not None
        assert self.daemon.poll() is None, (self.directory / "log").read_text()
        return self._run("version").returncode == 0

    def run(self, *arguments: str, stdin: bytes | None = None) -> str:
        """What `docker` prints."""
        done = self._run(*arguments, stdin=stdin)
        log = (self.directory / "log").read_text()[-3000:]
        assert done.returncode == 0, f"{arguments}: {done.stdout!r} {done.stderr!r}\n{log}"
        return done.stdout.decode()

    def refused(self, *arguments: str) -> str:
        """Why `docker` fails."""
        done = self._run(*arguments)
        assert done.returncode != 0, arguments
        return done.stderr.decode()

    def _run(self, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        command = ["docker", "--host", f"unix://{self.directory}/sock", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, timeout=60)

    def image(self, name: str, root: Path) -> None:
        """An image of a directory."""
        tar = subprocess.run(["tar", "--create", "--directory", str(root), "."], capture_output=True, check=True)
        self.run("import", "-", name, stdin=tar.stdout)

    def stop(self) -> None:
        """Ends it and its containers."""
        if self.daemon is not None and self.daemon.poll() is None:
            for container in self._run("ps", "--quiet", "--all").stdout.decode().split():
                self._run("rm", "--force", container)
            self.daemon.terminate()
            self.daemon.wait(30)
