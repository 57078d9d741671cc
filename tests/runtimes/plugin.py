"""The CNI plugin as a program, and what a runtime does with it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.supervisor.world import Node

PROGRAM = f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
PROGRAM += "from appliance.runtimes.cni import main\nsys.exit(main())\n"


def install(directory: Path) -> Path:
    """The plugin by its name, as an installation has it: without the finders of an editable one."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "appliance-cni"
    path.write_text(PROGRAM)
    path.chmod(0o755)
    return path


def conflist(node: Node, state: Path) -> dict[str, Any]:
    """The example, for a node of a test."""
    data: dict[str, Any] = json.loads((ROOT / "config" / "10-edge-appliance.conflist").read_text())
    data["plugins"][0] |= {"socket": str(node.socket), "state": str(state)}
    return data


@dataclass
class Runtime:
    """Calls plugins in a node's namespace, as the specification says."""

    node: Node
    directory: Path
    version: str = "1.1.0"

    def __post_init__(self) -> None:
        self._program = install(self.directory / "bin")
        self.state = self.directory / "cni"

    def call(self, command: str, container: str, netns: str = "", **more: Any) -> tuple[int, Any]:
        """Exit status and result of an operation; `container` is SERVICE.NUMBER."""
        environment = {"CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_IFNAME": "net0"}
        environment |= {"CNI_NETNS": netns, "CNI_ARGS": f"K8S_POD_NAME={container}", "CNI_PATH": "/usr/lib/cni"}
        config = conflist(self.node, self.state)
        config = {**config["plugins"][0], "cniVersion": self.version, "name": config["name"], **more}
        inside = ["nsenter", f"--net=/run/netns/{self.node.namespace.name}", str(self._program)]
        done = subprocess.run(
            inside, input=json.dumps(config), env=environment, capture_output=True, text=True, timeout=60
        )
        assert not done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def collect(self, valid: list[dict[str, str]]) -> tuple[int, Any]:
        """Exit status and result of GC with these attachments on its list."""
        more: dict[str, Any] = {"cni.dev/valid-attachments": valid}
        return self.call("GC", "", **more)

    def add(self, container: str, netns: str) -> dict[str, Any]:
        """The result of a successful ADD."""
        status, result = self.call("ADD", container, netns)
        assert status == 0, result
        return dict(result)

    def files(self) -> list[str]:
        """What the plugin remembers."""
        return sorted(it.name for it in self.state.glob("*/*"))
