"""The playbooks, for real: two gateways and three cluster hosts, from nothing to traffic and back to nothing.

    control ── underlay ─┬─ cluster1, cluster2, cluster3
       (Ansible)         ├─ gateway1 ── container `load`, that calls
                         └─ gateway2 ── container `load`, that answers

One test follows another, and needs those before it: each is a chapter in the life of the same machines.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import pytest
import yaml
from machines import CACHE, CONTROL, ROOT, Machine, Site, run

import appliance
from appliance.config import Config
from appliance.dataplane.cache import fingerprint

FIRST = appliance.__version__
SECOND, BROKEN = f"{FIRST}+second", f"{FIRST}+broken"
CLUSTER = tuple(Machine(f"cluster{number}", f"198.51.100.{number}") for number in (1, 2, 3))
GATEWAY1, GATEWAY2 = GATEWAYS = (Machine("gateway1", "198.51.100.11"), Machine("gateway2", "198.51.100.12"))
MACHINES = (*CLUSTER, *GATEWAYS)
INVENTORY, PKI = CACHE / "inventory.yml", CACHE / "pki"
PROGRAMS = ROOT / "tests" / "lab" / "programs"
CONNECTIONS = 50
DESCRIPTOR = "app: load\\nnamespace: rollout\\nservice: {name}\\nservice_namespace: load\\ninstances: 1\\n"
SSH = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
APPLIANCE = "/usr/local/bin/appliance"
NEVER_READY = """

def run(config: Config, path: Path) -> int:
    time.sleep(3600)
    return 1
"""
"""A supervisor that starts and says nothing."""

pytestmark = pytest.mark.root


def bundle(version: str) -> Path:
    """Where the archive of a version is."""
    return (ROOT / "dist" if version == FIRST else CACHE / "bundles") / f"edge-appliance-{version}-x86_64.tar"


def make_bundle(version: str, addition: str = "") -> None:
    """The first version's archive with another version in it, which has `addition` in its supervisor."""
    source = CACHE / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "appliance", source / "appliance", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    (source / "appliance/__init__.py").write_text(f'__version__ = "{version}"\n')
    with (source / "appliance/supervisor/main.py").open("a") as main:
        main.write(addition)
    run(ROOT / ".venv/bin/pip", "wheel", "-q", "--no-deps", "--wheel-dir", source / "wheels", source)
    (wheel,) = (source / "wheels").iterdir()
    bundle(version).parent.mkdir(exist_ok=True)
    with tarfile.open(bundle(FIRST)) as first, tarfile.open(bundle(version), "w") as made:
        for member in first.getmembers():
            if member.isfile() and "edge_appliance" not in member.name:
                made.addfile(member, first.extractfile(member))
        made.add(wheel, wheel.name)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """The machines, up."""
    make_bundle(SECOND)
    make_bundle(BROKEN, NEVER_READY)
    site = Site(MACHINES)
    try:
        site.open()
        shutil.rmtree(PKI, ignore_errors=True)
        INVENTORY.write_text(yaml.safe_dump(inventory(site)))
        yield site
    finally:
        site.close()


def inventory(site: Site, brokers: Sequence[Machine] = CLUSTER) -> dict[str, Any]:
    """As ansible/inventory/example.yml, with these machines."""
    return {
        "all": {
            "vars": {
                "ansible_user": "root",
                "ansible_ssh_private_key_file": str(site.key),
                "ansible_ssh_common_args": SSH,
                "appliance_version": FIRST,
                "appliance_ready_timeout": 30,
            },
            "children": {
                "cluster": {"hosts": {it.name: {"ansible_host": it.address} for it in brokers}},
                "gateways": {"hosts": {it.name: {"ansible_host": it.address} for it in GATEWAYS}},
            },
        }
    }


def lend_compiled(gateway: Machine) -> None:
    """Gives a gateway the packet path that was compiled for these sources here, which spares it minutes.

    Its processor is this machine's, and its Python's code of the same minor version: another one would compile anew, as
    the directory's name is made from all that it depends on.
    """
    kept = Path(Config().paths.cache)
    with patch.object(sys, "version", gateway.inside("python3", "-c", "import sys; print(sys.version, end='')")):
        wanted = f"numba-{fingerprint()}"
    shutil.copytree(kept / f"numba-{fingerprint()}", gateway.place / "root" / kept.relative_to("/") / wanted)


def play(site: Site, name: str, *options: str, fails: bool = False, **variables: Any) -> str:
    """What a playbook printed. Raises AssertionError if it failed, or if it did not although it should."""
    if (version := variables.get("appliance_version")) in (SECOND, BROKEN):
        variables["appliance_bundle"] = str(bundle(version))
    playbook = ROOT / ".venv/bin/ansible-playbook"
    chosen = () if "-i" in options else ("-i", INVENTORY)
    return control(playbook, *chosen, f"playbooks/{name}.yml", *options, "-e", json.dumps(variables), fails=fails)


def control(*command: str | Path, fails: bool = False, at: Path = ROOT / "ansible") -> str:
    """What a command printed where Ansible runs. Raises AssertionError if it failed, or did not although it should."""
    environment = {
        "PATH": f"/usr/sbin:/sbin:{os.defpath}",
        "HOME": str(CACHE),
        "ANSIBLE_NOCOLOR": "1",
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        ["ip", "netns", "exec", CONTROL, *command],
        cwd=at, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = str(done.stdout) + str(done.stderr)
    assert (done.returncode != 0) == fails, said
    return said


def changes(said: str) -> dict[str, int]:
    """How many tasks changed something, by host."""
    return {host: int(count) for host, count in re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", said, re.MULTILINE)}


def status(machine: Machine) -> dict[str, Any]:
    """What `appliance status` says there."""
    found: dict[str, Any] = json.loads(machine.inside(APPLIANCE, "status", "--json"))
    return found


class Load:
    """Idle TCP connections and a UDP ping, from a container on gateway1 to a service whose instance is on gateway2."""

    def __init__(self) -> None:
        self._programs: list[subprocess.Popen[str]] = []
        service = self._container(GATEWAY2, "echo")
        self._container(GATEWAY1, "steady")
        self._start(GATEWAY2, "echo.py", "7000")
        address = next(it["v4"] for it in service["service_ips"] if it["policy"] == "rr")
        self._steady = self._start(GATEWAY1, "steady.py", address, "7000", str(CONNECTIONS))

    @staticmethod
    def _container(machine: Machine, name: str) -> dict[str, Any]:
        text = DESCRIPTOR.format(name=name)
        deployed = CLUSTER[0].inside("sh", "-c", f"printf '{text}' | {APPLIANCE} deploy --json /dev/stdin")
        machine.inside("ip", "netns", "add", "load")
        job = f"load.rollout.{name}.load"
        machine.inside(APPLIANCE, "attach", "--service", job, "--instance", "0", "--netns", "load")
        found: dict[str, Any] = json.loads(deployed)["services"][0]
        return found

    def _start(self, machine: Machine, program: str, *arguments: str) -> subprocess.Popen[str]:
        inside = ("ip", "netns", "exec", "load", "python3", "-c", (PROGRAMS / program).read_text(), *arguments)
        started = subprocess.Popen(
            ("nsenter", "-t", str(machine.pid), "-a", "--", *inside),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._programs.append(started)
        assert _pipe(started.stdout).readline() == "ready\n"
        return started

    def take(self) -> dict[str, Any]:
        """What there was since the last time: sent, lost, gap_ms, broken."""
        to = _pipe(self._steady.stdin)
        to.write("\n")
        to.flush()
        said: dict[str, Any] = json.loads(_pipe(self._steady.stdout).readline())
        return said

    def end(self) -> None:
        """Ends the programs and removes the containers."""
        for program in self._programs:
            program.kill()
            program.wait()
        for machine, name in ((GATEWAY1, "steady"), (GATEWAY2, "echo")):
            job = f"load.rollout.{name}.load"
            machine.inside("pkill", "-f", "import.*socket", check=False)
            machine.inside(APPLIANCE, "detach", "--service", job, "--instance", "0")
            machine.inside("ip", "netns", "delete", "load")
            CLUSTER[0].inside(APPLIANCE, "undeploy", job)


def _pipe(end: IO[str] | None) -> IO[str]:
    assert end is not None
    return end


def picture(machine: Machine) -> set[str]:
    """What a machine's kernel and systemd hold, and its files, as far as an appliance adds to them; line by line."""
    commands = {
        "link": "ip -br link",
        "address": "ip -br address show scope global",
        "route": "ip route; ip rule; ip -6 rule",
        "user": "cat /etc/passwd /etc/group",
        "unit": "systemctl list-unit-files --no-legend --state=enabled,disabled",
        "file": "ls -d /run/* /var/lib/* /var/lib/private/* /var/log/* /var/cache/* /opt/* /etc/* /etc/*.d/* "
        "/etc/systemd/system/* /etc/systemd/system/*.wants/* /usr/local/bin/*",
        "process": "ps -eo args= | grep -e [a]ppliance -e [n]ats",
        "forwarding": "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding",
        "namespace": "ip netns",
    }
    found = {name: machine.inside("sh", "-c", command, check=False) for name, command in commands.items()}
    found["rule"] = run("ip", "netns", "exec", machine.namespace, "nft", "list", "ruleset")
    return {f"{name} {line}" for name, lines in found.items() for line in lines.splitlines()}


def changed(before: dict[str, set[str]]) -> list[str]:
    """What is not as it was, on any machine."""
    return sorted(f"{it.name}: {line}" for it in MACHINES for line in picture(it) ^ before[it.name])


@pytest.fixture(scope="module")
def before(site: Site) -> dict[str, set[str]]:
    """The machines as they were when nothing had been installed, but somebody had logged in and used `ip netns`.

    That leaves /run/netns, a mount that is iproute2's own and goes with the next boot.
    """
    for machine in MACHINES:
        machine.inside("sh", "-c", "ip netns add used && ip netns delete used")
        site.control("ssh", "-i", site.key, *SSH.split(), f"root@{machine.address}", "true")
    return {machine.name: picture(machine) for machine in MACHINES}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"appliance_version": "latest"}, 'appliance_version: expected a version such as 0.1.0, got "latest"'),
        ({"appliance_node_id": "gw"}, 'appliance_node_id: expected 24 lower-case hexadecimal digits, got "gw"'),
        ({"appliance_ready_timeout": "soon"}, "'appliance_ready_timeout' is of type .* unable to convert to int"),
        ({"appliance_config": {"tunnel": {"port": 70000}}}, "tunnel.port: expected an integer from 1 to 65535"),
        ({"appliance_config": {"tunnel": {"prot": 1}}}, "tunnel.prot: expected a known key"),
        ({"appliance_node_id": "0" * 24}, "appliance_node_id: expected another one on each gateway"),
        ({"appliance_python": "python2"}, r"expected Python 3.11 or later with venv as python2 \(appliance_python"),
        ({"cluster_mqtt": "everywhere"}, 'cluster_mqtt: expected HOST:PORT, got "everywhere"'),
        ({"cluster_tls": False}, "cluster_tls: expected true, as the group cluster has several hosts"),
    ],
    ids=lambda it: next(iter(it)) if isinstance(it, dict) else "",
)
def test_a_wrong_variable_fails_before_anything_is_touched(
    site: Site, before: dict[str, set[str]], variables: dict[str, Any], said: str
) -> None:
    limits = {"appliance_node_id": "gateways", "cluster_mqtt": "cluster", "cluster_tls": CLUSTER[0].name}
    limit = limits.get(next(iter(variables)), GATEWAY1.name)
    output = " ".join(play(site, "install", "--limit", limit, fails=True, **variables).split())
    assert re.search(said, output.replace('\\"', '"')), output
    assert changed(before) == []


def test_check_mode_tells_what_would_be_done_and_does_nothing(site: Site, before: dict[str, set[str]]) -> None:
    said = play(site, "install", "--check", "--diff")
    assert min(changes(said).values()) >= 3
    assert "+[cluster]" in said
    assert changed(before) == []


def test_one_command_from_empty_machines_to_traffic(site: Site) -> None:
    for gateway in GATEWAYS:
        lend_compiled(gateway)
    said = control("make", "rollout", f"INVENTORY={INVENTORY}", at=ROOT)
    for machine in GATEWAYS:
        assert said.count(f"'{machine.name}'") >= 2, said  # heard by both gateways, over IPv4 and IPv6
    for gateway in GATEWAYS:
        assert gateway.inside("systemctl", "is-active", "edge-appliance").strip() == "active"
        gateway.inside("systemd-analyze", "verify", "/etc/systemd/system/edge-appliance.service")
    for host in CLUSTER:
        host.inside("systemd-analyze", "verify", "/etc/systemd/system/edge-cluster.service")
    assert not set(CLUSTER[0].inside("ls", "/etc/edge-cluster/pki").split()) & {"ca.key", "nodes.tar"}
    assert ".key" not in CLUSTER[0].inside("ls", "/etc/edge-cluster/pki/nodes")


def test_the_second_run_changes_nothing(site: Site) -> None:
    assert changes(play(site, "install")) == {machine.name: 0 for machine in MACHINES}
    checked = play(site, "install", "--check", "--limit", f"{CLUSTER[0].name},{GATEWAY1.name}")
    assert set(changes(checked).values()) == {0}


def test_a_broker_of_several_does_not_become_one_alone(site: Site) -> None:
    alone = CACHE / "alone.yml"
    alone.write_text(yaml.safe_dump(inventory(site, CLUSTER[:1])))
    said = " ".join(play(site, "install", "-i", str(alone), "--limit", "cluster", fails=True).split())
    assert "the group cluster: expected several hosts, as the broker of cluster1 is one of several, got 1" in said


def test_a_reloadable_key_is_reloaded_and_another_one_restarts(site: Site) -> None:
    started = [status(gateway)["node"]["started"] for gateway in GATEWAYS]
    gateways = ("--limit", "gateways")
    play(site, "install", *gateways, appliance_config={"log": {"level": "debug"}})
    assert [status(gateway)["node"]["started"] for gateway in GATEWAYS] == started
    play(site, "install", *gateways, appliance_config={"workers": {"busy_poll": 1}})
    assert all(status(gateway)["node"]["started"] > then for gateway, then in zip(GATEWAYS, started, strict=True))
    play(site, "install", *gateways)


@pytest.fixture(scope="module")
def load(site: Site) -> Load:
    """Traffic, for the chapters that follow."""
    return Load()


def broker(gateway: Machine) -> str:
    """The address of the broker that a gateway is connected to; empty if it is not."""
    cluster = status(gateway)["cluster"]
    return str(cluster["broker"]).split("/")[-1].partition(":")[0] if cluster["connected"] else ""


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_cluster_host_may_be_away(site: Site, load: Load) -> None:
    load.take()
    first = {gateway.inside("grep", "^url", "/etc/edge-appliance/appliance.toml").split(",")[0] for gateway in GATEWAYS}
    assert len(first) == len(GATEWAYS), "gateways begin with another broker each"
    away = next(host for host in CLUSTER if host.address == broker(GATEWAY1))
    here = next(host for host in CLUSTER if host is not away)
    away.inside("systemctl", "kill", "--signal=KILL", "edge-cluster")
    away.inside("systemctl", "stop", "edge-cluster")
    until(lambda: broker(GATEWAY1) not in ("", away.address))
    here.inside("sh", "-c", f"printf '{DESCRIPTOR.format(name='away')}' | {APPLIANCE} deploy /dev/stdin")
    here.inside(APPLIANCE, "undeploy", "load.rollout.away.load")
    away.inside("systemctl", "start", "edge-cluster")
    until(lambda: "load.rollout.echo.load" in away.inside(APPLIANCE, "services", check=False))
    seen = load.take()
    print("a cluster host away:", seen)
    assert seen["broken"] == 0, seen
    assert seen["lost"] < seen["sent"] / 100, seen


def test_an_upgrade_breaks_no_connection(site: Site, load: Load) -> None:
    load.take()
    said = play(site, "upgrade", appliance_version=SECOND)
    seen = load.take()
    print("upgrade:", seen)
    assert [status(gateway)["node"]["version"] for gateway in GATEWAYS] == [SECOND, SECOND], said
    assert seen["broken"] == 0, seen


def test_a_version_that_does_not_become_ready_is_rolled_back_and_stops_the_rollout(site: Site, load: Load) -> None:
    started = status(GATEWAY2)["node"]["started"]
    load.take()
    broken = {"appliance_version": BROKEN, "appliance_ready_timeout": 15}
    said = play(site, "upgrade", "--limit", "gateways", fails=True, **broken)
    seen = load.take()
    print("failed upgrade:", seen)
    assert "did not become ready" in said
    assert f"{SECOND} is in force again" in " ".join(said.split())
    assert [status(gateway)["node"]["version"] for gateway in GATEWAYS] == [SECOND, SECOND]
    assert status(GATEWAY2)["node"]["started"] == started
    assert seen["broken"] == 0, seen


def test_rollback_puts_the_version_before_in_force(site: Site, load: Load) -> None:
    load.take()
    play(site, "rollback")
    seen = load.take()
    print("rollback:", seen)
    assert [status(gateway)["node"]["version"] for gateway in GATEWAYS] == [FIRST, FIRST]
    assert seen["broken"] == 0, seen
    load.end()


def test_remove_leaves_nothing(site: Site, before: dict[str, set[str]]) -> None:
    play(site, "remove")
    assert changed(before) == []
    for machine in MACHINES:
        left = {it for it in machine.files() if "edge" in it or "appliance" in it}
        assert not left, left
