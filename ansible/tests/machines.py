"""Machines to try the playbooks on: Debian that boots systemd in namespaces of this machine, reached by ssh.

Theory of operation
-------------------
A machine is a root filesystem (an overlay over one that mmdebstrap made of Debian's packages, in `.cache/rollout`), and
network, mount, pid, uts, ipc and cgroup namespaces in which `/lib/systemd/systemd` is process 1, with a cgroup2 subtree
as its root. It has its own /run, /tmp, /dev and /proc, which is checked before systemd starts, and cannot write what
belongs to the whole kernel: /sys, and all of /proc/sys but its network namespace's /proc/sys/net. All machines and the
place where Ansible runs (`CONTROL`) have a link to one bridge, which stands in
CONTROL; nothing is created in this machine's own network.

Killing process 1 ends a machine; its mounts go with its namespaces. What is left then, also of a run that was killed,
is found by name and removed by `Site.close`, which the start calls too. A lock keeps two runs apart.

Not as on a real gateway: the kernel and its clock are this machine's, there are no modules to load, no boot loader, no
udev events, and the root filesystem is an overlay.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "rollout"
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "openssh-server", "python3", "python3-venv", "iproute2", "procps",
)  # fmt: skip
PREFIX = "rollout-"
CONTROL = f"{PREFIX}control"
CONTROL_ADDRESS = "198.51.100.254"
BOOT_S = 60.0
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

INIT = """
set -eu
mount --make-rprivate /
hostname "$2"
cd "$1"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,rw proc/sys/net
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for device in $3; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mkdir -p dev/net dev/pts dev/shm
touch dev/net/tun
mount --bind /dev/net/tun dev/net/tun
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for i in 0 1 2; do ln -s /proc/self/fd/$i dev/$(echo stdin stdout stderr | cut -d' ' -f$((i + 1))); done
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p .outside
pivot_root . .outside
umount -l /.outside
rmdir /.outside
inside=$(stat -c %d:%i /tmp /run /dev /sys/fs/cgroup)
for it in $inside; do
  case " $4 " in *" $it "*) echo "expected own directories, got $inside"; exit 1;; esac
done
mount --make-rshared /
exec env -i container=rollout PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd
"""
"""From the namespaces' first process to systemd: ROOT NAME DEVICES OUTSIDE (`_identities`). It sees no other mounts.

systemd empties /tmp and /run and moves processes between cgroups: nothing starts while one of them is this machine's.
"""


def run(*command: str | Path, check: bool = True, **more: object) -> str:
    """A command's output. Raises AssertionError with what it said if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **more)  # type: ignore[call-overload]
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def base() -> Path:
    """The root filesystem below all machines; made once for one list of packages."""
    wanted = hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:12]
    place = CACHE / f"base-{wanted}"
    if not place.exists():
        made = CACHE / "base.new"
        shutil.rmtree(made, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        run(
            "mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}",
            "--aptopt=Acquire::Languages \"none\"", SUITE, made, f"deb {MIRROR} {SUITE} main",
        )  # fmt: skip
        made.chmod(0o755)
        made.rename(place)
    return place


def overlay(place: Path) -> Path:
    """A root filesystem over the base, which keeps its changes in `place`; its path."""
    for directory in ("up", "work", "root"):
        (place / directory).mkdir(parents=True)
        (place / directory).chmod(0o755)
    options = f"lowerdir={base()},upperdir={place / 'up'},workdir={place / 'work'}"
    run("mount", "-t", "overlay", "overlay", "-o", options, place / "root")
    return place / "root"


def cgroups() -> Path:
    """Where cgroup2 is mounted on this machine."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return Path(next(mount[1] for mount in mounts if mount[2] == "cgroup2"))


def _identities() -> str:
    """Device and inode of this machine's directories that no other systemd may have."""
    stats = (Path(at).stat() for at in ("/tmp", "/run", "/dev", cgroups()))
    return " ".join(f"{it.st_dev}:{it.st_ino}" for it in stats)


@dataclass
class Machine:
    """One machine, by its name and its address on the underlay."""

    name: str
    address: str
    pid: int = 0

    @property
    def namespace(self) -> str:
        """The name of its network namespace."""
        return PREFIX + self.name

    @property
    def place(self) -> Path:
        """Its overlay's directories."""
        return CACHE / "machines" / self.name

    @property
    def cgroup(self) -> Path:
        """The root of its cgroups."""
        return cgroups() / self.namespace

    def inside(self, *command: str, check: bool = True) -> str:
        """Runs a command in the machine, past ssh; its output."""
        return run("nsenter", "-t", str(self.pid), "-a", "--", *command, check=check)

    def boot(self, key: Path) -> None:
        """Starts it, with a key that may log in as root. `booted` waits."""
        self._prepare(key)
        self.cgroup.mkdir(exist_ok=True)
        command = (
            "ip", "netns", "exec", self.namespace,
            "unshare", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--fork",
            "sh", "-c", INIT, "init", str(self.place / "root"), self.name, " ".join(DEVICES),
            _identities(),
        )  # fmt: skip
        procs = self.cgroup / "cgroup.procs"
        log = (self.place / "console").open("w")
        self._outer = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=lambda: procs.write_text(str(os.getpid())) and None,
        )  # fmt: skip

    def _prepare(self, key: Path) -> None:
        root = overlay(self.place)
        (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
        (root / "root/.ssh/authorized_keys").write_text(key.with_suffix(".pub").read_text())
        (root / "etc/hostname").write_text(f"{self.name}\n")
        (root / "etc/machine-id").write_text("")

    def booted(self) -> None:
        """Waits until systemd has started what it should. Raises AssertionError if it does not."""
        deadline = time.monotonic() + BOOT_S
        while self.pid == 0 or self.inside("systemctl", "is-system-running", check=False).strip() != "running":
            assert time.monotonic() < deadline, f"{self.name}: {(self.place / 'console').read_text()}"
            assert self._outer.poll() is None, f"{self.name}: {(self.place / 'console').read_text()}"
            children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/exe").readlink().name == "systemd":
                self.pid = int(children[0])
            time.sleep(0.1)

    def files(self) -> set[str]:
        """The files that were added to the root filesystem, or changed in it."""
        up = self.place / "up"
        return {str(it.relative_to(up)) for it in up.rglob("*") if not it.is_dir() or it.is_symlink()}


@dataclass
class Site:
    """The machines, their network, and where Ansible runs."""

    machines: Sequence[Machine]
    key: Path = field(default_factory=lambda: CACHE / "key")

    def open(self) -> None:
        """Boots all machines. Raises AssertionError."""
        CACHE.mkdir(parents=True, exist_ok=True)
        self._lock = (CACHE / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.close()
        if not self.key.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
        self._network()
        for machine in self.machines:
            machine.boot(self.key)
        for machine in self.machines:
            machine.booted()

    def _network(self) -> None:
        control = ("ip", "-n", CONTROL)
        run("ip", "netns", "add", CONTROL)
        run(*control, "link", "add", "underlay", "type", "bridge")
        run(*control, "addr", "add", f"{CONTROL_ADDRESS}/24", "dev", "underlay")
        for link in ("lo", "underlay"):
            run(*control, "link", "set", link, "up")
        for machine in self.machines:
            space = machine.namespace
            run("ip", "netns", "add", space)
            run(*control, "link", "add", machine.name, "type", "veth", "peer", "name", "eth0", "netns", space)
            run(*control, "link", "set", machine.name, "master", "underlay", "up")
            for arguments in (
                ("link", "set", "lo", "up"),
                ("link", "set", "eth0", "up"),
                ("addr", "add", f"{machine.address}/24", "dev", "eth0"),
                ("route", "add", "default", "via", CONTROL_ADDRESS),
            ):
                run("ip", "-n", space, *arguments)

    def control(self, *command: str | Path, check: bool = True, **more: object) -> str:
        """Runs a command where all machines can be reached; its output."""
        return run("ip", "netns", "exec", CONTROL, *command, check=check, **more)

    def close(self) -> None:
        """Removes everything of this run, or of one that was killed."""
        for group in cgroups().glob(f"{PREFIX}*"):
            _end(group)
        for place in (CACHE / "machines").glob("*"):
            with suppress(AssertionError):
                run("umount", place / "root")
            shutil.rmtree(place)
        for line in run("ip", "netns", "list").splitlines():
            if (name := line.split()[0]).startswith(PREFIX):
                run("ip", "netns", "delete", name)


def _end(group: Path) -> None:
    """Kills all processes below a cgroup and removes it."""
    deadline = time.monotonic() + BOOT_S
    while members := list(_members(group)):
        assert time.monotonic() < deadline, f"{group}: {members} do not end"
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for directory in sorted(group.rglob("*"), key=lambda it: len(it.parts), reverse=True):
        if directory.is_dir():
            directory.rmdir()
    group.rmdir()


def _members(group: Path) -> Iterator[int]:
    for procs in (group / "cgroup.procs", *group.rglob("cgroup.procs")):
        yield from map(int, procs.read_text().split())


if __name__ == "__main__":  # leaves nothing of a run that was killed
    Site(()).close()
    sys.exit()
