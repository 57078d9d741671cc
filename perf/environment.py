"""The machine that a result was measured on, so that nobody compares what cannot be compared."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from perf import meter, net
from perf.load.tool import ROOT

LIBRARIES = ("numba", "numpy", "pyroute2")


def machine() -> dict[str, Any]:
    """Kernel, processor, memory, versions, and how busy the machine was before."""
    return {
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "hypervisor": "hypervisor" in _field("/proc/cpuinfo", "flags").split(),
        "memory_gib": round(int(_field("/proc/meminfo", "MemTotal").split()[0]) / 2**20, 1),
        "busy_before_percent": round(meter.busy_percent()),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "iperf3": net.run("iperf3", "--version").split()[1],
        "iproute2": net.run("ip", "-V").strip().rpartition("-")[2].split(",")[0],
        "commit": _commit(),
    }


def _field(path: str, name: str) -> str:
    """The first value of a name in a file of `name : value` lines."""
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", Path(path).read_text(), re.MULTILINE)
    return found[1].strip() if found else "unknown"


def _commit() -> str:
    """The commit that the work tree is at, with a mark if the code differs from it; `unknown` outside git."""
    try:
        described = net.run("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    except net.NetError:
        return "unknown"
    return described.strip()
