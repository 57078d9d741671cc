"""What a soak looks at: memory and descriptors of every process of a lab, and every packet that was dropped."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from appliance.client import ApiError
from appliance.lab import processes
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import Host, Node
from perf import meter

TUN: Final = "edge-tun0"
TX_DROPPED: Final = 11
"""Field of a line of /proc/net/dev, after the name."""
PERIOD_S: Final = 1.0
SOCKETS: Final = {"Udp": "snmp", "Udp6": "snmp6"}

SHARED: Final = "tables, flows, counters"
"""What processes of a node share, each its part."""

Drops = dict[tuple[str, str], int]
"""Packets by direction and reason. The direction `kernel` has what was lost before a worker saw it."""
MACHINE: Final = ("machine", "backlog")
"""What the machine's CPUs lost on the way between two links, whoever's (second field of /proc/net/softnet_stat): the
queue that all namespaces share. On a machine that is not overloaded there is none."""


@dataclass(frozen=True)
class Memory:
    """One moment's MiB, descriptors and processes by role, of the whole lab."""

    at: float
    mib: Mapping[str, float]
    descriptors: Mapping[str, int]
    processes: Mapping[str, int]


def memory(lab: Lab) -> Memory:
    """Of all processes of nodes and cluster; the servers and callers in containers are not ours to judge."""
    descriptors, count = Counter[str](), Counter[str]()
    sizes: dict[str, float] = {SHARED: 0.0}
    for role, pid in _roles(lab):
        try:
            own, shared = meter.own_and_shared_mib(pid)
            opened = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        sizes[role] = sizes.get(role, 0.0) + own
        sizes[SHARED] = sizes.get(SHARED, 0.0) + shared
        descriptors[role] += opened
        count[role] += 1
    return Memory(time.monotonic(), sizes, descriptors, count)


def _roles(lab: Lab) -> Iterator[tuple[str, int]]:
    for host in lab.plan.hosts:
        head = lab.supervisor(host)
        workers = _workers(lab, host)
        for it in processes.members(lab.plan.spec.name, [host.namespace]):
            is_head = head is not None and it.pid == head.pid
            yield _role(host, it.command, is_head=is_head, is_worker=it.pid in workers), it.pid


def _workers(lab: Lab, host: Host) -> frozenset[int]:
    if not isinstance(host, Node):
        return frozenset()
    return frozenset(it["pid"] for it in lab.api(host).status()["workers"])


def _role(host: Host, command: tuple[str, ...], *, is_head: bool, is_worker: bool) -> str:
    """What a process of a host is for."""
    if not isinstance(host, Node):
        return "manager" if is_head else "broker"
    if is_head or is_worker:
        return "supervisor" if is_head else "worker"
    modules = {"appliance.supervisor.template": "template", "appliance.naming.process": "resolver"}
    return next((modules[word] for word in command if word in modules), "other")


def drops(lab: Lab) -> Drops:
    """Of all nodes, since they were started. Raises ApiError, OSError."""
    found: Counter[tuple[str, str]] = Counter()
    for node in lab.plan.nodes:
        status = lab.api(node).status()
        for worker in status["workers"]:
            for direction, reasons in worker["drops"].items():
                for reason, count in reasons.items():
                    found[direction, reason] += count
        found["guard", "forged"] += sum(it["frames"] for it in status["forged"])
        found.update(_lost_by_kernel(status["node"]["pid"]))
    lines = Path("/proc/net/softnet_stat").read_text().splitlines()
    found[MACHINE] = sum(int(line.split()[1], 16) for line in lines)
    return dict(found)


def _lost_by_kernel(pid: int) -> Drops:
    """What found no room: in the TUN's queues, and in the sockets of the namespace of a process."""
    found = {("kernel", "tun-queue"): 0, ("kernel", "socket-buffer"): 0}
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == TUN:
            found["kernel", "tun-queue"] = int(counts.split()[TX_DROPPED])
    lines = [line.split() for line in Path(f"/proc/{pid}/net/snmp").read_text().splitlines()]
    names, values = (line for line in lines if line[0] == "Udp:")
    found["kernel", "socket-buffer"] = int(values[names.index("RcvbufErrors")])
    for line in Path(f"/proc/{pid}/net/snmp6").read_text().splitlines():
        if line.startswith("Udp6RcvbufErrors"):
            found["kernel", "socket-buffer"] += int(line.split()[1])
    return found


@dataclass(frozen=True)
class Growth:
    """So many packets more of one direction and reason, between two moments."""

    direction: str
    reason: str
    began: float
    ended: float
    packets: int


@dataclass
class Watch:
    """Looks at the drops each PERIOD_S, in a thread of its own; what cannot be read is looked at the next time."""

    lab: Lab
    growths: list[Growth] = field(default_factory=list)
    unread: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        at, before = time.monotonic(), drops(self.lab)
        while True:
            is_last = self._ended.wait(PERIOD_S)
            now = time.monotonic()
            try:
                found = drops(self.lab)
            except (ApiError, OSError):
                self.unread += 1
                found = None
            if found is not None:
                self.growths += grown(before, found, at, now)
                at, before = now, found
            if is_last:
                return


def grown(before: Drops, after: Drops, began: float, ended: float) -> list[Growth]:
    """What there is more of."""
    return [
        Growth(*key, began, ended, count - before.get(key, 0))
        for key, count in after.items()
        if count > before.get(key, 0)
    ]
