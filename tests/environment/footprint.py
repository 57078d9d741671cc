"""What there is on a machine that the appliance could leave something of: compared before it came and after it went.

`ip`, `tc`, `nft` and `bpftool` are asked, as an operator would. Other tests run beside this one, so programs of eBPF
are told apart by their tag, which the kernel makes of the instructions: `tag` loads the same ones and reads it.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from appliance.dataplane import bpf
from tests.environment.netns import Netns, command

CGROUPS = Path("/sys/fs/cgroup")
DEFAULTS = (Path("/run/edge-appliance"), Path("/var/lib/edge-appliance"))
"""Where the appliance would be by default; no test is."""


def footprint(namespace: Netns) -> dict[str, Any]:
    """Links, addresses, routes, rules, queueing disciplines, filters and nftables of a namespace."""
    links = [link["ifname"] for link in namespace.json("link")]
    return {
        **namespace.state(),
        "rules": [namespace.ip(family, "rule") for family in ("-4", "-6")],
        "qdiscs": command("tc", "-n", namespace.name, "qdisc"),
        "filters": [_filters(namespace, link) for link in links],
        "nft": namespace.command("nft", "list", "ruleset"),
        "bpf": namespace.command("bpftool", "net", "show"),
    }


def _filters(namespace: Netns, link: str) -> str:
    places = ("root", "ingress", "egress")
    return "".join(command("tc", "-n", namespace.name, "filter", "show", "dev", link, place) for place in places)


def everywhere() -> dict[str, Any]:
    """What is no namespace's: control groups that somebody named after us, default directories."""
    groups = sorted(str(it) for it in CGROUPS.rglob("*") if it.is_dir() and "edge-" in it.name)
    return {"cgroups": groups, "directories": [str(it) for it in DEFAULTS if it.exists()]}


def cgroups(pids: Iterable[int]) -> set[str]:
    """The control groups that processes are in."""
    return {Path(f"/proc/{pid}/cgroup").read_text() for pid in pids}


def tag(kind: int, program: bytes) -> str:
    """What `bpftool` calls this program."""
    fd = bpf.load(kind, program, "edge_test")
    try:
        said = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    return next(line.split()[1] for line in said.splitlines() if line.startswith("prog_tag:"))


def loaded() -> set[str]:
    """The tags of all programs that the kernel has."""
    return {it["tag"] for it in json.loads(command("bpftool", "-j", "prog", "show"))}
