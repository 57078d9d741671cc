"""A guest: a kernel of Debian's, busybox as all of its programs, and a web server, in qemu's software emulation."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODULES: tuple[str, ...] = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci")
MODULES += ("failover", "net_failover", "virtio_net")
PACKAGE = "linux-image-cloud-amd64"
APPLETS = ("sh", "mount", "insmod", "ip", "httpd", "cat", "echo", "sleep", "ls", "wget")
INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in {modules}; do insmod /lib/$module.ko; done
for word in $(cat /proc/cmdline); do case $word in guest_*) export "$word";; esac; done
echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad
ip link set lo up
ip link set eth0 up
ip addr add $guest_v4 dev eth0
ip addr add $guest_v6 dev eth0
ip route add default via $guest_gw4
ip -6 route add default via $guest_gw6
echo it is the guest > /www/index.html
echo ready
exec httpd -f -h /www
"""


def unpacked(directory: Path) -> Path:
    """The newest kernel image of the distribution, unpacked and not installed. Raises CalledProcessError."""
    say = ["apt-cache", "depends", "--important", PACKAGE]
    depends = subprocess.run(say, capture_output=True, text=True, check=True).stdout.split()
    image = next(it for it in depends if it.startswith("linux-image-") and it != PACKAGE)
    options = ["-o", "APT::Sandbox::User=root"]
    subprocess.run(["apt-get", *options, "-q", "download", image], cwd=directory, check=True, capture_output=True)
    (package,) = directory.glob("linux-image-*.deb")
    subprocess.run(["dpkg-deb", "-x", package, directory / "image"], check=True)
    return directory / "image"


def initrd(image: Path, busybox: Path, directory: Path) -> Path:
    """The guest's whole file system."""
    root = directory / "root"
    for name in ("bin", "lib", "proc", "sys", "www", "dev"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin" / "busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    for module in MODULES:
        (found,) = image.glob(f"lib/modules/*/kernel/**/{module}.ko")
        shutil.copy(found, root / "lib")
    (root / "init").write_text(INIT.format(modules=" ".join(MODULES)))
    (root / "init").chmod(0o755)
    files = "\n".join(str(it.relative_to(root)) for it in sorted(root.rglob("*")))
    archive = subprocess.run(
        [busybox, "cpio", "-o", "-H", "newc"], cwd=root, input=files.encode(), capture_output=True, check=True
    )
    path = directory / "initrd"
    path.write_bytes(archive.stdout)
    return path


@contextmanager
def running(
    inside: list[str], kernel: Path, ramdisk: Path, told: dict[str, str], device: str, mac: str, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A guest behind `device` (options of qemu's `-netdev tap`) in a namespace, which `inside` enters; it is ended."""
    append = " ".join(("console=ttyS0 quiet panic=-1", *(f"guest_{key}={value}" for key, value in told.items())))
    command = [*inside, "qemu-system-x86_64", "-M", "q35", "-accel", "tcg"]
    command += ["-cpu", "max", "-m", "192", "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"]
    command += ["-kernel", str(kernel), "-initrd", str(ramdisk), "-append", append, "-netdev", f"tap,id=n0,{device}"]
    command += ["-device", f"virtio-net-pci,netdev=n0,romfile=,mac={mac}"]
    fds = [int(device.removeprefix("fd="))] if device.startswith("fd=") else []
    with log.open("wb") as output:
        popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=fds)
        try:
            yield popen
        finally:
            popen.kill()
            popen.wait()


def open_macvtap(inside: list[str], directory: Path) -> int:
    """A descriptor of a macvtap device, of which a container's /dev has no node."""
    ask = [*inside, "sh", "-c", "cat /sys/class/net/tap0/macvtap/*/dev"]
    major, minor = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip().split(":")
    node = directory / "macvtap"
    os.mknod(node, 0o600 | 0o020000, os.makedev(int(major), int(minor)))
    return os.open(node, os.O_RDWR)
