"""A lab's life: up, down, what there is, and what may happen to it meanwhile.

Theory of operation
-------------------
`up` writes down what the lab will consist of, then builds it: namespaces and links, the cluster, supervisors, services,
demo servers, attachments. `down` goes by names and records, not by what `up` believes it has done: so the same
`down` serves a lab that runs, one whose `up` was interrupted or killed, and one whose processes have
crashed. `up` begins with it, and ends with it if it fails. `scale` writes the lab down while it has most containers.

The cluster and all supervisors are started, then waited for; so are the demo servers. One that ends, or is not ready
within READY_S, fails the lab with the last lines of its log. A server listens before its container is attached, since
a container is called from then on.

`kill`, `stop`, `start`, `unplug` and `plug` do to a host (a node, or the cluster) what their names say, and nothing
else: a node that is started again has the files of before.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from appliance.client import ApiError, Client
from appliance.config_text import in_force
from appliance.lab import network, processes
from appliance.lab.cluster import Manager, Picture
from appliance.lab.files import Files
from appliance.lab.plan import (
    IPERF_PORTS,
    ROLES,
    WEB_PORT,
    WEB_SERVICE,
    Container,
    Host,
    Node,
    Spec,
    Topology,
    cluster_options,
    descriptors,
    node_config,
    topology,
)
from appliance.lab.processes import Process

TOOLS = {"ip": "iproute2", "iperf3": "iperf3"}
"""Programs that a lab runs, and the Debian packages that have them."""
READY_S = 90.0
"""Seconds that a process gets until it is ready; a busy machine may need most of them."""
POLL_S = 0.02
SETTLE_S = 30.0
"""Seconds until every node knows of a change; it takes less than one."""
DRAIN_S = 1.5
"""Seconds in which every node hears that an instance is draining, and its calls end."""
ATTACH_AT_ONCE = 8
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

    @property
    def manager(self) -> Manager:
        """The cluster service manager."""
        return Manager(self.plan.cluster)

    def api(self, node: Node) -> Client:
        """The local API of a node."""
        return Client(self.files.socket(node.name))

    def namespace(self, member: str) -> str:
        """The namespace of a container, a host or the underlay, by its name. Raises LabError."""
        names = {it.name: it.namespace for it in self.plan.members}
        names["underlay"] = self.plan.underlay
        if member not in names:
            raise LabError(f"{member}: expected one of {', '.join(names)}")
        return names[member]

    def command(self, member: str, command: Sequence[str]) -> list[str]:
        """A command line that runs a command in a container, a host or the underlay."""
        return processes.inside(self.namespace(member), command)

    def host(self, name: str) -> Host:
        """A node, or the cluster, by its name. Raises LabError."""
        for host in self.plan.hosts:
            if host.name == name:
                return host
        raise LabError(f"{name}: expected one of {', '.join(it.name for it in self.plan.hosts)}")

    def supervisor(self, host: Host) -> Process | None:
        """The supervisor of a node, or the manager of the cluster, if it lives."""
        record = processes.recorded(self.files.record(host.name))
        return record if record is not None and processes.alive(record) else None


def opened(name: str) -> Lab:
    """A lab that was started before. Raises NoLabError."""
    files = Files(name)
    return Lab(files, files.load())


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
    lab = Lab(files, plan)
    files.save(plan.spec)
    report(f"network: a cluster, {len(plan.nodes)} nodes, {len(plan.containers)} containers")
    network.build(plan)
    for node in plan.nodes:
        files.config(node.name).write_text(in_force(node_config(plan, node, files.of(node.name))))
    _run(lab, plan.cluster)
    _warm(files, plan, report)
    report("nodes: starting, as members of the cluster")
    for node in plan.nodes:
        _run(lab, node)
    start_servers(files, plan)
    _await(lab, plan.cluster)
    report("services: deploying")
    lab.manager.deploy(descriptors(plan.spec))
    for node in plan.nodes:
        _await(lab, node)
    report("containers: attaching")
    _attach(lab, plan.containers)
    return lab


def _run(lab: Lab, host: Host) -> None:
    """Starts a node's supervisor, or the cluster's manager and broker."""
    processes.start(
        lab.plan.spec.name, host.namespace, _command(lab, host), lab.files.log(host.name), lab.files.record(host.name)
    )


def _command(lab: Lab, host: Host) -> list[str]:
    if isinstance(host, Node):
        return _appliance("run", "-c", str(lab.files.config(host.name)))
    return _appliance("cluster", "run", *cluster_options(lab.plan, lab.files.of(host.name)))


def _await(lab: Lab, host: Host) -> None:
    """Waits until a node has its subnets, or the cluster answers. Raises LabError."""
    ready = partial(_is_member, lab, host) if isinstance(host, Node) else partial(_is_manager, lab)
    _wait(lab.files.record(host.name), lab.files.log(host.name), ready)


def _is_manager(lab: Lab) -> bool:
    try:
        lab.manager.picture()
    except ApiError:
        return False
    return True


def _is_member(lab: Lab, node: Node) -> bool:
    try:
        return bool(lab.api(node).cluster()["ready"])
    except ApiError:
        return False


def _attach(lab: Lab, containers: Sequence[Container]) -> None:
    """Attaches containers, all known to the whole lab when this returns. Raises ApiError or LabError."""
    with ThreadPoolExecutor(max_workers=ATTACH_AT_ONCE) as pool:
        list(pool.map(partial(_attach_one, lab), containers))
    _settle(lab, lambda picture: all(map(picture.is_up, containers)), "the cluster knows of all containers")


def _attach_one(lab: Lab, container: Container) -> None:
    lab.api(container.node).attach(container.service, container.instance, {"netns": container.namespace})


def _settle(lab: Lab, settled: Callable[[Picture], bool], what: str) -> None:
    """Waits until the cluster, and then every node that runs, knows of a change. Raises ApiError or LabError."""
    picture = lab.manager.picture()
    deadline = time.monotonic() + SETTLE_S
    while not settled(picture):
        _expect_in_time(deadline, what)
        picture = lab.manager.picture()
    for node in filter(lab.supervisor, lab.plan.nodes):
        while not _knows(lab, node, picture):
            _expect_in_time(deadline, f"{node.name} knows the services")


def _expect_in_time(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise LabError(f"not within {SETTLE_S:g} s: {what}")
    time.sleep(POLL_S)


def _knows(lab: Lab, node: Node, picture: Picture) -> bool:
    """Whether a node's tables have all instances that are up, and no other node's that is not. It is asked to need the
    services: who calls them for the first time would wait for a question to the cluster."""
    api = lab.api(node)
    for service in ROLES.values():
        api.need(service)
    hosts = [it for it in api.hosts() if it["owner"].rpartition(".")[0] in ROLES.values()]  # a node is a host too
    elsewhere = {it["address"] for it in hosts if not it["local"]}
    up = {address for it in lab.plan.containers if picture.is_up(it) for address in _addresses(picture, it)}
    return elsewhere <= up <= {it["address"] for it in hosts}


def _addresses(picture: Picture, container: Container) -> list[str]:
    placed = picture.placed(container)
    return [it for it in (placed.address_v4, placed.address_v6) if it is not None]


# --- Changes ------------------------------------------------------------------------------------


def scale(name: str, role: str, instances: int, report: Report = lambda _: None) -> Lab:
    """Gives a service so many instances. Raises NoLabError, SpecError, LabError, NetworkError, ApiError.

    A new instance serves before it is called. One that is to go is drained first: for DRAIN_S it gets no new calls and
    ends those that it has. Then it is taken out of the cluster, and when no node has it any more, off its node.
    """
    if ROLES.get(role, role) != WEB_SERVICE:
        raise LabError(f"service: expected web, or {WEB_SERVICE}, got {role}")
    files = Files(name)
    with files.locked():
        before = opened(name)
        after = Lab(files, topology(replace(before.plan.spec, instances=instances)))
        more = [it for it in after.plan.web if it not in before.plan.web]
        less = [it for it in before.plan.web if it not in after.plan.web]
        report(f"{WEB_SERVICE}: from {len(before.plan.web)} to {instances} instances")
        if more:
            _grow(after, more)
        if less:
            _shrink(before, after, less)
        return after


def _grow(lab: Lab, containers: Sequence[Container]) -> None:
    lab.files.save(lab.plan.spec)
    network.add(it.namespace for it in containers)
    start_servers(lab.files, lab.plan, containers)
    lab.manager.deploy(descriptors(lab.plan.spec))
    _attach(lab, containers)


def _shrink(before: Lab, after: Lab, containers: Sequence[Container]) -> None:
    after.manager.deploy(descriptors(before.plan.spec, draining=containers))
    time.sleep(DRAIN_S)
    after.manager.deploy(descriptors(after.plan.spec))
    _settle(after, lambda picture: not any(map(picture.is_up, containers)), "the cluster has forgotten them")
    for it in containers:
        with suppress(ApiError):  # its node may be down: then the link goes with the namespace
            after.api(it.node).detach(it.service, it.instance)
    records = [it for container in containers for it in _records(before.files, container)]
    processes.stop(records)
    namespaces = [it.namespace for it in containers]
    processes.stop(processes.members(before.plan.spec.name, namespaces), grace=1.0)
    network.remove(namespaces)
    after.files.save(after.plan.spec)
    for it in containers:
        shutil.rmtree(after.files.of(it.name))


def _records(files: Files, container: Container) -> list[Process]:
    found = (processes.recorded(path) for path in files.of(container.name).glob("*.pid"))
    return [it for it in found if it is not None]


def kill(name: str, host: str) -> None:
    """Ends all processes of a node, or of the cluster, by SIGKILL. Raises NoLabError, LabError."""
    lab = opened(name)
    processes.kill(processes.members(name, [lab.host(host).namespace]))


def stop(name: str, host: str) -> None:
    """Ends a node's supervisor, or the cluster's manager, as an operator does. Raises NoLabError, LabError."""
    lab = opened(name)
    found = lab.supervisor(lab.host(host))
    processes.stop([] if found is None else [found])


def start(name: str, host: str) -> None:
    """Starts a node, or the cluster, that has ended; it is ready when this returns. Raises NoLabError, LabError."""
    lab = opened(name)
    wanted = lab.host(host)
    with lab.files.locked():
        if lab.supervisor(wanted) is not None:
            raise LabError(f"{host}: expected one that has ended")
        _run(lab, wanted)
        _await(lab, wanted)


def plug(name: str, host: str, state: Literal["up", "down"]) -> None:
    """Pulls a host's cable, or puts it in again. Raises NoLabError, LabError, NetworkError."""
    lab = opened(name)
    network.plug(lab.plan, lab.host(host), state)


# --- Processes ----------------------------------------------------------------------------------


def _appliance(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "appliance", *arguments]


def _warm(files: Files, plan: Topology, report: Report) -> None:
    """Compiles the packet path once, so that the nodes do not all do it at the same time."""
    report("packet path: compiling, or loading what is compiled")
    command = _appliance("warm", "-c", str(files.config(plan.nodes[0].name)))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"`appliance warm` failed with status {done.returncode}:\n{done.stderr}")


def start_servers(files: Files, plan: Topology, containers: Sequence[Container] = ()) -> None:
    """The demo service and iperf3 in each web container, or in these, all listening when this returns."""
    servers = [(it, *server) for it in containers or plan.web for server in _servers(it)]
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
