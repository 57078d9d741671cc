"""What a soak does to a lab while it is called: instances, services, workers and offloads come, go and change.

Each kind of change is a function from a lab and the number of the round to what it did; after a whole round the lab is
as it was. `EXPLAINED` says which kinds explain which drops: a count that grew at another time has no excuse.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from appliance.cluster.manager.descriptor import Descriptor
from appliance.lab import lifecycle, network, processes
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import Container, Node
from perf import offload

INSTANCES: Final = 3
MORE: Final = 5
POLICIES: Final = ("rr", "least-flows", "maglev", "closest")
NUMBERED: Final = 100
"""From which on the containers of services that come and go are numbered."""
AWAY_S: Final = 2.0
"""For which an instance is gone, or offloads are off."""
CALLS: Final = 5
CALL_TIMEOUT_S: Final = 30.0


class ChurnError(RuntimeError):
    """A change that did not come about; `str()` says which."""


def added(lab: Lab, number: int) -> str:
    """Two more instances."""
    lifecycle.scale(lab.plan.spec.name, "web", MORE)
    return f"{MORE} instances"


def drained(lab: Lab, number: int) -> str:
    """The two drained and taken away."""
    lifecycle.scale(lab.plan.spec.name, "web", INSTANCES)
    return f"{INSTANCES} instances"


def removed(lab: Lab, number: int) -> str:
    """The last instance detached while it is called, and its container ended, as a runtime does; then a new one."""
    web = lab.plan.web[-1]
    api = lab.api(web.node)
    api.detach(web.service, web.instance)
    processes.kill(processes.members(lab.plan.spec.name, [web.namespace]))
    network.remove([web.namespace])
    time.sleep(AWAY_S)
    network.add([web.namespace])
    lifecycle.start_servers(lab.files, lab.plan, [web])
    api.attach(web.service, web.instance, {"netns": web.namespace})
    return web.name


def service(lab: Lab, number: int) -> str:
    """A service of a name that nobody had, deployed, called from every node, undeployed while it is called."""
    node, policy = lab.plan.nodes[number % len(lab.plan.nodes)], POLICIES[number % len(POLICIES)]
    name = f"demo.lab.s{number}.lab"
    container = Container(f"web{NUMBERED + number}", f"{lab.plan.spec.name}-web{NUMBERED + number}", node, name, 0)
    with _served(lab, container):
        lab.manager.deploy([_descriptor(name, policy)])
        lab.api(node).attach(name, 0, {"netns": container.namespace})
        try:
            _call(lab, _address(lab, name, policy))
        finally:
            lab.manager.undeploy(name)
            lab.api(node).detach(name, 0)
    return f"{name}, {policy}"


def _descriptor(name: str, policy: str) -> Descriptor:
    app, namespace, own, service_namespace = name.split(".")
    fixed = {"app": app, "namespace": namespace, "service": own, "service_namespace": service_namespace}
    return Descriptor.model_validate({**fixed, "instances": 1, "service_ips": {policy: {}}})


@contextmanager
def _served(lab: Lab, container: Container) -> Iterator[None]:
    """A namespace with the demo's servers, as long as the block runs."""
    network.add([container.namespace])
    lab.files.of(container.name).mkdir(exist_ok=True)
    try:
        lifecycle.start_servers(lab.files, lab.plan, [container])
        yield
    finally:
        processes.stop(processes.members(lab.plan.spec.name, [container.namespace]), grace=1.0)
        network.remove([container.namespace])
        shutil.rmtree(lab.files.of(container.name))


def _address(lab: Lab, name: str, policy: str) -> str:
    """The IPv4 ServiceIP of a policy, once the cluster calls an instance up. Raises ChurnError."""
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while time.monotonic() < deadline:
        shown = lab.manager.picture().service(name)
        if any(it["status"] == "up" for it in shown.get("instances", ())):
            return next(str(it["v4"]) for it in shown["service_ips"] if it["policy"] == policy)
        time.sleep(0.05)
    raise ChurnError(f"{name}: not up within {CALL_TIMEOUT_S:g} s")


def _call(lab: Lab, address: str) -> None:
    """Calls from each node's client. Raises ChurnError if one fails."""
    for node in lab.plan.nodes:
        client = lab.plan.client(node.number)
        command = [sys.executable, "-m", "appliance.lab.probe", address, "--times", str(CALLS)]
        done = subprocess.run(
            lab.command(client.name, command),
            capture_output=True,
            text=True,
            timeout=CALL_TIMEOUT_S,
            env=processes.environment(lab.plan.spec.name),
        )
        if done.returncode or len(json.loads(done.stdout)) != 2 * CALLS:
            raise ChurnError(f"{client.name}: {address}: {done.stderr.strip()[-300:]}")


def killed(lab: Lab, number: int) -> str:
    """One worker, by SIGKILL."""
    workers = [(node, it) for node in lab.plan.nodes for it in lab.api(node).status()["workers"]]
    node, worker = workers[number % len(workers)]
    os.kill(worker["pid"], signal.SIGKILL)
    _await_workers(lab, node)
    return f"{node.name}, worker {worker['index']}"


def renewed(lab: Lab, number: int) -> str:
    """All workers of a node, one after the other."""
    node = lab.plan.nodes[number % len(lab.plan.nodes)]
    lab.api(node).renew_workers()
    return node.name


def _await_workers(lab: Lab, node: Node) -> None:
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while lab.api(node).status()["ill"]:
        if time.monotonic() > deadline:
            raise ChurnError(f"{node.name}: a worker was not replaced within {CALL_TIMEOUT_S:g} s")
        time.sleep(0.02)


def offloads(lab: Lab, number: int) -> str:
    """Segmentation and GRO of a node's uplink, and segmentation of its client's device, off and on again."""
    node = lab.plan.nodes[number % len(lab.plan.nodes)]
    with ExitStack() as stack:
        stack.enter_context(offload.switched(node.namespace, network.UPLINK, segmentation=False, gro=False))
        stack.enter_context(offload.switched(lab.plan.client(node.number).namespace, "eth0", segmentation=False))
        time.sleep(AWAY_S)
    return node.name


KINDS: Final[dict[str, Callable[[Lab, int], str]]] = {
    "instances added": added,
    "instances drained": drained,
    "instance removed": removed,
    "service": service,
    "worker killed": killed,
    "workers renewed": renewed,
    "offloads": offloads,
}
"""In the order of a round."""

EXPLAINED: Final[dict[tuple[str, str], tuple[tuple[str, ...], str]]] = {
    ("wire", "not-local"): (
        ("instance removed", "service"),
        "another node sent before it heard that the instance went",
    ),
    ("tun", "unknown-service"): (("service",), "last words of connections to a service that is gone"),
    ("tun", "spoofed-source"): (
        ("instance removed",),
        "an instance that is withdrawn still answers until its link is down",
    ),
}
"""For each direction and reason, the changes that explain it, and why."""

FORGIVEN: Final[dict[str, tuple[str, ...]]] = {
    "connection": ("instance removed",),
    "datagram": ("instance removed", "worker killed"),
    "unstopped": ("instance removed", "worker killed"),
    "download": ("instance removed",),
    "kept": (),
}
"""For each kind of call, the changes during which it may fail: an instance that is removed takes along the calls that
it has, a killed worker the datagrams that it has in hand."""
UNRELIABLE: Final = ("datagram", "unstopped")
"""Calls that may also fail because the machine lost a packet before anybody saw it (`watch.MACHINE`)."""
