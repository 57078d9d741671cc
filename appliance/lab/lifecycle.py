"""A lab's life: up, down, and what there is.

Theory of operation
-------------------
`up` writes down what the lab will consist of, then builds it: namespaces and links, supervisors, attachments,
demo servers, services. `down` goes by names and records, not by what `up` believes it has done: so the same
`down` serves a lab that runs, one whose `up` was interrupted or killed, and one whose supervisors have
crashed. `up` begins with it, and ends with it if it fails.

All supervisors are started, then waited for; so are the demo servers. One that ends, or is not ready within
READY_S, fails the lab with the last lines of its log.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from appliance.client import ApiError, Client
from appliance.config_text import in_force
from appliance.lab import network, processes, routes
from appliance.lab.files import Files
from appliance.lab.plan import (
    IPERF_PORTS,
    WEB_PORT,
    Attached,
    Container,
    Node,
    Spec,
    Topology,
    node_config,
    topology,
)
from appliance.lab.processes import Process

TOOLS = {"ip": "iproute2", "iperf3": "iperf3"}
"""Programs that a lab runs, and the Debian packages that have them."""
READY_S = 90.0
"""Seconds that a process gets until it is ready; a busy machine may need most of them."""
POLL_S = 0.02
LOG_LINES = 15
"""Last lines of a log that an error repeats."""
LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp (include/net/tcp_states.h)."""

Report = Callable[[str], None]
"""Takes a sentence about what is being done."""


class LabError(Exception):
    """The lab could not be built, or not be removed as a whole; `str()` says what and where."""


@dataclass(frozen=True)
class Lab:
    """A lab that is up."""

    files: Files
    plan: Topology
    attached: tuple[Attached, ...]

    def api(self, node: Node) -> Client:
        """The local API of a node."""
        return Client(self.files.socket(node.name))

    def namespace(self, member: str) -> str:
        """The namespace of a container, a node or the underlay, by its name. Raises LabError."""
        names = {it.name: it.namespace for it in self.plan.members}
        names["underlay"] = self.plan.underlay
        if member not in names:
            raise LabError(f"{member}: expected one of {', '.join(names)}")
        return names[member]

    def command(self, member: str, command: Sequence[str]) -> list[str]:
        """A command line that runs a command in a container, a node or the underlay."""
        return processes.inside(self.namespace(member), command)

    def supervisor(self, node: Node) -> Process | None:
        """The supervisor of a node, if it lives."""
        record = processes.recorded(self.files.record(node.name))
        return record if record is not None and processes.alive(record) else None


def opened(name: str) -> Lab:
    """A lab that was started before. Raises NoLabError."""
    files = Files(name)
    plan, attached = files.load()
    return Lab(files, plan, tuple(attached))


def up(spec: Spec, report: Report = lambda _: None) -> Lab:
    """Builds a lab; one of the same name ends first. Raises SpecError, LabError, NetworkError, ApiError.

    Whatever goes wrong, an interrupt included, nothing of it is left.
    """
    plan = topology(spec)
    _expect_tools()
    files = Files(spec.name)
    for node in plan.nodes:
        node_config(plan, node, files.of(node.name))  # a wrong setting ends here, before anything is touched
    with files.locked():
        _clean(files, report)
        try:
            return _build(files, plan, report)
        except BaseException:
            _clean(files, report)
            raise


def down(name: str, report: Report = lambda _: None) -> None:
    """Removes a lab and all that is left of one. Raises LabError for processes that it may not end."""
    files = Files(name)
    with files.locked():
        _clean(files, report)


def exists(name: str) -> bool:
    """Whether there is anything of a lab."""
    return Files(name).directory.exists() or bool(network.existing(name))


def _expect_tools() -> None:
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise LabError(f"{tool}: expected to be installed (Debian package {package})")


# --- Up -----------------------------------------------------------------------------------------


def _build(files: Files, plan: Topology, report: Report) -> Lab:
    files.create(plan)
    report(f"network: {len(plan.nodes)} nodes, {len(plan.containers)} containers")
    network.build(plan)
    _start_nodes(files, plan, report)
    report("containers: attaching")
    attached = tuple(_attach(files, container) for container in plan.containers)
    files.save(plan, attached)
    _start_servers(files, plan)
    report("services: publishing")
    routes.publish(files, plan, attached)
    return Lab(files, plan, attached)


def _start_nodes(files: Files, plan: Topology, report: Report) -> None:
    """A supervisor for each node, all ready when this returns."""
    routes.prepare(files, plan)
    for node in plan.nodes:
        text = in_force(node_config(plan, node, files.of(node.name)))
        files.config(node.name).write_text(text)
    _warm(files, plan, report)
    report("nodes: starting")
    for node in plan.nodes:
        command = _appliance("run", "-c", str(files.config(node.name)))
        log, record = files.log(node.name), files.record(node.name)
        processes.start(plan.spec.name, node.namespace, command, log, record)
    for node in plan.nodes:
        _wait(files.record(node.name), files.log(node.name), partial(_answers, files, node))


def _appliance(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "appliance", *arguments]


def _warm(files: Files, plan: Topology, report: Report) -> None:
    """Compiles the packet path once, so that the nodes do not all do it at the same time."""
    report("packet path: compiling, or loading what is compiled")
    command = _appliance("warm", "-c", str(files.config(plan.nodes[0].name)))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"`appliance warm` failed with status {done.returncode}:\n{done.stderr}")


def _answers(files: Files, node: Node) -> bool:
    try:
        Client(files.socket(node.name)).status()
    except ApiError:
        return False
    return True


def _attach(files: Files, container: Container) -> Attached:
    client = Client(files.socket(container.node.name))
    answer = client.attach(container.service, container.instance, {"netns": container.namespace})
    return Attached(container.name, answer["address_v4"] or None, answer["address_v6"] or None)


def _start_servers(files: Files, plan: Topology) -> None:
    """The demo service and iperf3 in each web container, all listening when this returns."""
    servers = [(it, *server) for it in plan.web for server in _servers(it)]
    for container, name, command, _ in servers:
        log, record = _server_files(files, container, name)
        processes.start(plan.spec.name, container.namespace, command, log, record)
    for container, name, _, port in servers:
        log, record = _server_files(files, container, name)
        _wait(record, log, partial(_listens, record, port))


def _server_files(files: Files, container: Container, name: str) -> tuple[Path, Path]:
    directory = files.of(container.name)
    return directory / f"{name}.log", directory / f"{name}.pid"


def _servers(container: Container) -> Iterator[tuple[str, list[str], int]]:
    """Name, command line and port of each server in a web container."""
    about = ["--container", container.name, "--instance", str(container.instance)]
    about += ["--node", container.node.name, "--port", str(WEB_PORT)]
    yield "http", [sys.executable, "-m", "appliance.lab.service", *about], WEB_PORT
    for port in IPERF_PORTS:
        yield f"iperf3-{port}", ["iperf3", "--server", "--port", str(port)], port


def _listens(record: Path, port: int) -> bool:
    """Whether a TCP port is open in the namespace of a recorded process, asked without connecting to it."""
    process = processes.recorded(record)
    if process is None:
        return False
    with suppress(OSError):
        for table in ("tcp", "tcp6"):
            lines = Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]
            sockets = [line.split() for line in lines]
            if any(local.endswith(f":{port:04X}") and state == LISTEN for _, local, _, state, *_ in sockets):
                return True
    return False


def _wait(record: Path, log: Path, ready: Callable[[], bool]) -> None:
    """Waits until a recorded process is ready. Raises LabError with its log if it ends or takes too long."""
    deadline = time.monotonic() + READY_S
    while not ready():
        process = processes.recorded(record)
        if process is None or not processes.alive(process):
            raise LabError(f"{record.parent.name}: {record.stem} ended:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise LabError(f"{record.parent.name}: {record.stem} not ready in {READY_S:g} s:\n{_tail(log)}")
        time.sleep(POLL_S)


def _tail(log: Path) -> str:
    with suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    return "(no log)"


# --- Down ---------------------------------------------------------------------------------------


def _clean(files: Files, report: Report) -> None:
    """Ends the processes, then the namespaces, then the files of a lab, as far as there are any."""
    namespaces = network.existing(files.lab)
    records = [it for path in files.records() if (it := processes.recorded(path))]
    if namespaces or records:
        report(f"removing lab {files.lab!r}")
    processes.stop(records)
    processes.stop(processes.members(files.lab, namespaces), grace=1.0)
    left = processes.strangers(files.lab, namespaces)
    network.remove(namespaces)
    files.clear()
    if left:
        names = ", ".join(f"{it.pid} ({' '.join(it.command)})" for it in left)
        raise LabError(f"left alone, as the lab did not start them: processes {names}")
