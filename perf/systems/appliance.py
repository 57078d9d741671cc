"""The appliance as the lab starts it: a supervisor with its workers on each node, the server behind a
ServiceIP."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from appliance.config_text import in_force
from appliance.lab import lifecycle
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import WEB_V4, WEB_V6, Node, node_config, setting
from perf import net
from perf.systems.system import WORKER, Process, System
from perf.topology import CLIENT_NODE, PLAN, Path

OFFLOADS = ("tun_tso", "tun_uso", "udp_gso", "udp_gro", "coalesce")
DESCRIBED = ("offloads",)
"""Parts of a node's status that a result repeats."""


class Appliance(System):
    """Two real nodes of a lab that is up; traffic is balanced and rewritten, as in operation."""

    name = "appliance"
    sentence = "the appliance, dialled by ServiceIP: balanced and rewritten"

    def __init__(self, mode: str = "", what: str = "", *settings: str) -> None:
        """As configured for the run, or in a mode: a word for its name, what it means, its `section.key=value`."""
        if mode:
            self.name, self.sentence, self.group = f"appliance-{mode}", f"the appliance {what}", mode
        self._settings = settings

    def set_up(self) -> Path:
        """The containers are the lab's. Raises NoLabError."""
        lab = self._lab()
        (server,) = lab.plan.web
        client = lab.plan.client(CLIENT_NODE.number)
        return Path(client.namespace, server.namespace, str(WEB_V4), str(WEB_V6))

    @contextmanager
    def active(self) -> Iterator[None]:
        """The nodes in this mode: restarted, if the last sample was of another one. Raises LabError."""
        reconfigure(self._settings)
        yield

    def processes(self) -> list[Process]:
        """Supervisor, template and workers of both nodes. Raises ApiError."""
        lab = self._lab()
        return [process for node in PLAN.nodes for process in _of(lab, node)]

    def describe(self) -> dict[str, Any]:
        """Workers of each node, and the offloads in use. Raises ApiError."""
        lab = self._lab()
        return {node.name: _summary(lab.api(node).status()) for node in PLAN.nodes} | {"settings": list(self._settings)}

    @staticmethod
    def _lab() -> Lab:
        return lifecycle.opened(net.LAB)


MODES = (
    Appliance("1worker", "with one worker a node", "workers.count=1"),
    Appliance("4workers", "with four workers a node", "workers.count=4"),
    Appliance("busy", "with adaptive busy polling", "workers.busy_poll=50"),
    Appliance("no-tso", "that reads no TCP super-packets", "offload.tun_tso=false"),
    Appliance("no-uso", "that reads no UDP super-packets", "offload.tun_uso=false"),
    Appliance("no-gso", "that sends one datagram a call", "offload.udp_gso=false"),
    Appliance("no-gro", "that receives one datagram a message", "offload.udp_gro=false"),
    Appliance("no-join", "that writes one packet at a time", "offload.coalesce=false"),
    Appliance("plain", "with no offload: packet by packet", *(f"offload.{it}=false" for it in OFFLOADS)),
)
"""How much each of its techniques is worth."""


def reconfigure(settings: tuple[str, ...]) -> None:
    """The nodes of the lab with these settings on top of the run's, restarted unless they run so already.

    The nodes' files tell which settings they run with; the lab's record has those of the run. Raises LabError.
    """
    lab = lifecycle.opened(net.LAB)
    spec = replace(lab.plan.spec, settings=(*lab.plan.spec.settings, *map(setting, settings)))
    wanted = {it: in_force(node_config(replace(lab.plan, spec=spec), it, lab.files.of(it.name))) for it in PLAN.nodes}
    stale = [node for node, text in wanted.items() if lab.files.config(node.name).read_text() != text]
    for node in stale:
        lifecycle.stop(net.LAB, node.name)
        lab.files.config(node.name).write_text(wanted[node])
    for node in stale:
        lifecycle.start(net.LAB, node.name)


def _summary(status: dict[str, Any]) -> dict[str, Any]:
    return {"workers": len(status["workers"]), **{key: status[key] for key in DESCRIBED}}


def _of(lab: Lab, node: Node) -> list[Process]:
    """A node's supervisor with all its descendants; those that its status does not call workers are the
    template's."""
    supervisor = lab.supervisor(node)
    if supervisor is None:
        raise net.NetError(f"{node.name}: expected a supervisor")
    workers = {worker["pid"] for worker in lab.api(node).status()["workers"]}
    found = [Process("supervisor", node.name, supervisor.pid)]
    for pid in descendants(supervisor.pid):
        found.append(Process(WORKER if pid in workers else "template", node.name, pid))
    return found


def descendants(pid: int) -> list[int]:
    """Pids of a process's children, their children, and so on."""
    found = []
    for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found
