"""`appliance doctor`: what a node needs, looked at one by one; each finding with a sentence on how to mend it.

A check is a function that gives a finding. What the kernel must be able to do is tried, in a namespace of its own. What
only the node itself knows (offloads, path MTUs, its membership) comes from its API; without a running appliance there
is one finding that says so.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appliance.cluster.broker import parse_urls
from appliance.config import Config

KERNEL_MIN = (6, 1)
KERNEL_USO = (6, 2)
OVERHEAD = 28
"""Bytes of the underlay's headers over IPv4; 48 over IPv6."""
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_NET_BIND_SERVICE": 10, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""Numbers of <linux/capability.h>."""
STALE_S = 300.0
CONNECT_S = 3.0

TRIAL_S = 30.0
MEND_TRIAL = {
    "bridge": "Load the module: modprobe bridge; list it in /etc/modules-load.d.",
    "veth": "Load the module: modprobe veth; list it in /etc/modules-load.d.",
    "sch_ingress": "Load the module: modprobe sch_ingress (Ubuntu: package linux-modules-extra); containers need it.",
    "cls_bpf": "Load the module: modprobe cls_bpf (Ubuntu: package linux-modules-extra); containers need it.",
    "multi_queue_tun": "Load the module: modprobe tun; without eBPF steering in it only workers.count = 1 works.",
    "reuseport": "A kernel with CONFIG_BPF_SYSCALL; without it only workers.count = 1 works.",
}

State = Literal["ok", "warning", "wrong", "unknown"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do if it is not well."""

    check: str
    state: State
    found: str
    mend: str = ""


def examine(config: Config, status: dict[str, Any] | None, why: str) -> list[Finding]:
    """All checks of this machine. `status`: of the API; if there is none, `why`."""
    here = [kernel(platform.release()), tun_device(), capabilities(Path("/proc/self/status").read_text())]
    here += [*tried(*trial()), *directories(config), clock(), *broker(config), descriptors()]
    if status is None:
        mend = "Start it with `appliance run`, or name its socket with --socket."
        return [*here, Finding("appliance", "unknown", why, mend)]
    return here + list(of_node(status, config.tunnel.mtu))


def kernel(release: str) -> Finding:
    """Whether the kernel is recent enough."""
    number = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdecimal())
    if number < KERNEL_MIN:
        return Finding("kernel", "wrong", release, "Install Linux 6.1 or later.")
    if number < KERNEL_USO:
        return Finding("kernel", "warning", f"{release}, without USO", "Linux 6.2 reads UDP super-packets from a TUN.")
    return Finding("kernel", "ok", release)


def tun_device(path: Path = Path("/dev/net/tun")) -> Finding:
    """Whether TUN devices can be made."""
    if not path.is_char_device():
        return Finding("TUN", "wrong", f"no {path}", "Load the module: modprobe tun; list it in /etc/modules-load.d.")
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("TUN", "wrong", f"no permission for {path}", "Run as root, or give this user the device.")
    return Finding("TUN", "ok", str(path))


def capabilities(status: str) -> Finding:
    """Whether a process with this `/proc/PID/status` may do what the supervisor does."""
    held = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    missing = [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    if missing:
        return Finding("capabilities", "wrong", "missing " + ", ".join(missing), "Run as root, or grant these.")
    return Finding("capabilities", "ok", "all that the supervisor needs")


def trial() -> tuple[dict[str, str], str]:
    """What the kernel says to all that the appliance will ask of it (``appliance.trial``), or why that is not known."""
    command = [sys.executable, "-m", "appliance.trial"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_S, check=False)
        return json.loads(done.stdout or "{}"), done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return {}, str(error)


def tried(found: dict[str, str], why: str) -> Iterator[Finding]:
    """Whether the kernel can do each of it."""
    if not found:
        lines = why.splitlines() or ["no answer"]
        yield Finding("kernel's parts", "unknown", lines[-1], "Run as root: it is tried in a namespace of its own.")
    for name, reason in found.items():
        if reason:
            yield Finding(name, "wrong", reason, MEND_TRIAL[name])
        else:
            yield Finding(name, "ok", "works")


def directories(config: Config) -> Iterator[Finding]:
    """Whether there is room for what the appliance keeps."""
    for name, path in (("state", config.paths.state), ("cache", config.paths.cache)):
        there = next(it for it in (path, *path.parents) if it.exists())
        free = shutil.disk_usage(there).free >> 20
        if not os.access(there, os.W_OK):
            yield Finding(f"paths.{name}", "warning", f"{there} cannot be written", "It forwards, and keeps nothing.")
        elif free < 100:
            yield Finding(f"paths.{name}", "warning", f"{free} MiB free at {there}", "Make room: 100 MiB are enough.")
        else:
            yield Finding(f"paths.{name}", "ok", f"{free} MiB free at {there}")


def clock() -> Finding:
    """Whether wall-clock time can be right: certificates need it, nothing else does."""
    year = time.gmtime().tm_year
    if year < 2024:
        return Finding("clock", "wrong", f"it is {year}", "Set the clock, or certificates count as not yet valid.")
    return Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))


def broker(config: Config) -> Iterator[Finding]:
    """Whether each broker can be reached from here."""
    for url in parse_urls(config.cluster.url) if config.cluster.url else ():
        host, port = url.host, url.port or config.cluster.port
        try:
            socket.create_connection((host, port), CONNECT_S).close()
        except OSError as error:
            mend = "Check cluster.url and cluster.port, the way there, and that `appliance cluster` runs."
            yield Finding("broker", "wrong", f"{host} port {port}: {error.strerror or error}", mend)
        else:
            yield Finding("broker", "ok", f"{host} port {port} answers")


def descriptors() -> Finding:
    """Whether a process may have as many sockets as many workers need."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1_024:
        return Finding("descriptors", "warning", f"{soft}", "Allow 1024: `ulimit -n`, or LimitNOFILE= of the unit.")
    return Finding("descriptors", "ok", str(soft))


# --- What a running node knows ------------------------------------------------------------------


def of_node(status: dict[str, Any], mtu: int) -> Iterator[Finding]:
    """Findings from a node's status."""
    yield _healthy(status)
    for name, offload in status["offloads"].items():
        yield _offload(name, offload)
    yield _paths(status["peers"], mtu)
    yield from _membership(status)
    yield from _tables(status["tables"])
    if status["node"]["last_error"]:
        yield Finding("last error", "warning", status["node"]["last_error"], "What it names is to be corrected.")


def _healthy(status: dict[str, Any]) -> Finding:
    reasons = [*status["ill"], *status["not_ready"]]
    if reasons:
        return Finding("node", "wrong", "; ".join(dict.fromkeys(reasons)), "The log says what came before.")
    return Finding("node", "ok", f"{len(status['workers'])} workers, ready")


def _offload(name: str, offload: dict[str, Any]) -> Finding:
    if offload["wanted"] and not offload["on"]:
        mend = f"A newer kernel or driver may have it; offload.{name} = false says that this is known."
        return Finding(name, "warning", offload["reason"] or "off", mend)
    return Finding(name, "ok", "on" if offload["on"] else "off by configuration")


def _paths(peers: dict[str, Any], mtu: int) -> Finding:
    smallest = peers["smallest_path_mtu"]
    if peers["unknown_path_mtu"]:
        found = f"no way to {peers['unknown_path_mtu']} of {peers['nodes']} nodes"
        return Finding("path MTU", "wrong", found, "Check the routes: `ip route get ADDRESS` of `appliance hosts`.")
    if smallest and smallest < mtu + OVERHEAD:
        wider, narrower = mtu + OVERHEAD, smallest - OVERHEAD
        mend = f"Senders are told; better is an underlay of {wider} bytes, or tunnel.mtu = {narrower}."
        return Finding("path MTU", "warning", f"{smallest} bytes to some node", mend)
    return Finding("path MTU", "ok", f"{smallest} bytes at least" if smallest else "no other nodes")


def _membership(status: dict[str, Any]) -> Iterator[Finding]:
    cluster = status["cluster"]
    if not cluster["member"]:
        yield Finding("cluster", "ok", "none is configured")
    elif not cluster["connected"]:
        mend = "What is known stays in force. Check the broker, and the certificates if it wants some."
        yield Finding("cluster", "wrong", f"not connected: {cluster['last_error'] or 'no reason known'}", mend)
    else:
        yield Finding("cluster", "ok", f"connected to {cluster['broker']} for {cluster['since']:.0f} s")


def _tables(tables: dict[str, Any]) -> Iterator[Finding]:
    age = tables.get("staleness", 0.0)
    if age > STALE_S:
        yield Finding("tables", "warning", f"may be {age:.0f} s old", "A manager that does not answer: see its log.")
    for name, size in tables["capacity"].items():
        if tables[name] > 0.9 * size:
            yield Finding(f"tables.{name}", "warning", f"{tables[name]} of {size}", f"Raise tables.{name}; restart.")
