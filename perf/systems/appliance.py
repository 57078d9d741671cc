"""The appliance as the lab starts it: a supervisor with its workers on each node, the server behind a
ServiceIP."""

import pathlib
from typing import Any

from appliance.lab import lifecycle
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import WEB_V4, WEB_V6, Node
from perf import net
from perf.systems.system import WORKER, Process
from perf.topology import CLIENT_NODE, PLAN, Path

DESCRIBED = ("offloads",)
"""Parts of a node's status that a result repeats."""


class Appliance:
    """Two real nodes of a lab that is up; traffic is balanced and rewritten, as in operation."""

    name = "appliance"
    sentence = "the appliance, dialled by ServiceIP: balanced and rewritten"

    def set_up(self) -> Path:
        """The containers are the lab's. Raises NoLabError."""
        lab = self._lab()
        (server,) = lab.plan.web
        client = lab.plan.client(CLIENT_NODE.number)
        return Path(client.namespace, server.namespace, str(WEB_V4), str(WEB_V6))

    def processes(self) -> list[Process]:
        """Supervisor, template and workers of both nodes. Raises ApiError."""
        lab = self._lab()
        return [process for node in PLAN.nodes for process in _of(lab, node)]

    def describe(self) -> dict[str, Any]:
        """Workers of each node, and the offloads in use. Raises ApiError."""
        lab = self._lab()
        return {node.name: _summary(lab.api(node).status()) for node in PLAN.nodes}

    @staticmethod
    def _lab() -> Lab:
        return lifecycle.opened(net.LAB)


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
