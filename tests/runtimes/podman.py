"""podman on a node of a test: its own storage and networks, containers from a directory, no images, no systemd."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.supervisor.world import Node

PLUGINS = "/usr/lib/cni"
HIDE = 'mount --make-rprivate /sys; umount /sys/fs/cgroup/unified 2> /dev/null; exec "$@"'
WITHOUT_HYBRID = ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", HIDE, "-"]
"""crun refuses version 1 and 2 of cgroups side by side. /run/netns stays shared: the appliance opens what is there."""
CONTAINERS = """
[containers]
cgroups = "disabled"
default_ulimits = []
netns = "bridge"
log_driver = "k8s-file"
[engine]
runtime = "crun"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "cni"
cni_plugin_dirs = ["{plugins}", "{own}"]
network_config_dir = "{networks}"
"""


def rootfs(directory: Path, busybox: Path) -> Path:
    """What a container has instead of an image."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "run", "www"):
        (directory / name).mkdir(parents=True)
    shutil.copy(busybox, directory / "bin" / "busybox")
    for applet in ("sh", "wget", "httpd", "sleep", "nslookup", "cat"):
        (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc" / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (directory / "www" / "index.html").write_text("it is the web\n")
    return directory


@dataclass
class Podman:
    """See the module."""

    node: Node
    directory: Path

    def __post_init__(self) -> None:
        self.networks.mkdir(parents=True)
        text = CONTAINERS.format(plugins=PLUGINS, own=self.directory / "bin", networks=self.networks)
        (self.directory / "containers.conf").write_text(text)

    @property
    def networks(self) -> Path:
        """Where configurations of networks are."""
        return self.directory / "net.d"

    def run(self, *arguments: str, check: bool = True) -> str:
        """What podman prints."""
        own = self.directory
        command = ["nsenter", f"--net=/run/netns/{self.node.namespace.name}", *WITHOUT_HYBRID, "podman"]
        command += ["--root", str(own / "root"), "--runroot", str(own / "runroot"), "--tmpdir", str(own / "tmp")]
        command += ["--storage-driver", "vfs", *arguments]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CONTAINERS_CONF": str(own / "containers.conf")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout
