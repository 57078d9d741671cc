"""How tests run things in a lab."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from appliance.lab import processes
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import WEB_V4, WEB_V6, Container, Family, Node
from tests.conftest import ROOT

FAMILIES: list[Family] = ["v4", "v6"]
TIMEOUT_S = 60.0
_ports = iter(range(20_000, 32_768))
"""Ports for calls: below those that the kernel chooses from (net.ipv4.ip_local_port_range)."""


def environment(lab: Lab) -> dict[str, str]:
    return processes.environment(lab.plan.spec.name)


def run(lab: Lab, member: str, *command: str, timeout: float = TIMEOUT_S) -> str:
    """The output of a command in a container; a failure shows its errors."""
    done = subprocess.run(
        lab.command(member, command),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(lab),
        cwd=ROOT,
    )
    assert done.returncode == 0, f"{member}: {' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def background(lab: Lab, member: str, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs in a container while the block does, its output in a pipe."""
    line = lab.command(member, command)
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment(lab), cwd=ROOT) as child:
        try:
            yield child
        finally:
            child.kill()


def program(name: str, *arguments: object) -> list[str]:
    """A command line for one of the programs in tests/lab/programs."""
    return [sys.executable, "-m", f"tests.lab.programs.{name}", *map(str, arguments)]


def line(child: subprocess.Popen[str]) -> str:
    """The next line that a background command prints; an end of the output is an empty one."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def result(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON object that a background command prints at its end."""
    data: dict[str, Any] = json.loads(line(child))
    assert child.wait(TIMEOUT_S) == 0
    return data


def probe(lab: Lab, member: str, address: str, times: int) -> list[dict[str, Any]]:
    """Calls of the demo service at an address, TCP and UDP, from ports that no other call of this run has had.

    The kernel may give one port to flows to two ServiceIPs of one instance, which the wire cannot tell apart.
    """
    own, *_ = (next(_ports) for _ in range(times))
    command = [sys.executable, "-m", "appliance.lab.probe", address, "--times", str(times), "--own-port", str(own)]
    return list(json.loads(run(lab, member, *command)))


def balanced(family: Family) -> str:
    """The demo's ServiceIP."""
    return str(WEB_V4 if family == "v4" else WEB_V6)


def instance_ip(lab: Lab, container: Container, family: Family) -> str:
    """The instance IP of a container."""
    placed = lab.manager.picture().placed(container)
    address = placed.instance_v4 if family == "v4" else placed.instance_v6
    assert address is not None
    return address


def namespace_ip(lab: Lab, container: Container, family: Family) -> str:
    """The address inside a container."""
    placed = lab.manager.picture().placed(container)
    address = placed.address_v4 if family == "v4" else placed.address_v6
    assert address is not None
    return address


def until(condition: Callable[[], Any], what: str, seconds: float = 10.0, pause: float = 0.01) -> None:
    """Waits for a condition; fails with a sentence if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(pause)


def counters(lab: Lab, node: Node) -> list[dict[str, Any]]:
    """The counters of each worker of a node, by index."""
    return [worker["counters"] for worker in lab.api(node).status()["workers"]]


def same(one: str, other: str) -> bool:
    """Whether two texts mean the same address."""
    return ip_address(one) == ip_address(other)


def link_counter(lab: Lab, member: str, link: str, counter: str) -> int:
    """A counter of a link (`tx_bytes` and the like) in a namespace."""
    return int(run(lab, member, "cat", f"/sys/class/net/{link}/statistics/{counter}"))


def leftovers(name: str) -> dict[str, list[str]]:
    """All that there is of a lab, anywhere on the machine."""
    mark = f"{processes.MARKER}={name}".encode()
    return {
        "namespaces": [it.name for it in Path("/run/netns").glob(f"{name}-*")],
        "processes": [it.parent.name for it in Path("/proc").glob("[0-9]*/environ") if mark in _environment(it)],
        "files": [str(it) for root in ("/run/edge-lab", "/etc/netns") for it in Path(root).glob(f"{name}*")],
        "links": [it.name for it in Path("/sys/class/net").glob("*") if it.name not in USUAL_LINKS],
    }


def _environment(path: Path) -> Sequence[bytes]:
    try:
        return path.read_bytes().split(b"\0")
    except OSError:
        return ()


USUAL_LINKS = frozenset(it.name for it in Path("/sys/class/net").glob("*"))
"""The machine's links before any test."""
NOTHING: dict[str, list[str]] = {"namespaces": [], "processes": [], "files": [], "links": []}
