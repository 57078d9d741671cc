"""The supervisor is killed at each command of a deployment, and of its end; the next one converges, in a cluster.

Each start dies at a later command than the one before, and what that one left is what the next one finds. So one run
goes through every command of both plans, with one start a command.
"""

import itertools
from contextlib import suppress

import pytest

from appliance.client import ApiError
from tests.environment.netns import Netns
from tests.manager.processes import Manager
from tests.supervisor.pair import ONE
from tests.supervisor.world import Node, World, ping, ready, until

pytestmark = pytest.mark.root

JOB = "app.ns.web.test"


def test_a_supervisor_killed_at_any_command_leaves_what_the_next_one_makes_right(hub: World) -> None:
    manager, container, node = hub.manager(), hub.container(), hub.member(ONE)
    manager.deploy(JOB, 1)
    clean = state_without_containers(node, container)
    adopted: list[bool] = []
    start(node, 1)
    for after in itertools.count(2):
        if not dies(node, container, attach=True):
            break
        start(node, after)
        adopted.append(bool(node.api.attachments()))
        if adopted[-1]:
            is_whole(node, manager, container)
            node.api.detach(JOB, 0)
        is_gone(node, manager, container, clean)
    assert len(adopted) >= 10
    assert adopted == [False] * (len(adopted) - 1) + [True], "only the last command commits"
    is_whole(node, manager, container)
    node.end()
    start(node, 1)
    assert dies(node, container, attach=False)
    start(node)
    is_gone(node, manager, container, clean)


def test_an_attachment_that_cannot_be_repaired_is_withdrawn_with_its_ports(hub: World) -> None:
    manager, container, node = hub.manager(), hub.container(), hub.member(ONE)
    manager.deploy(JOB, 1)
    ready(node.start("tests.supervisor.failing", 1))
    node.api.attach(JOB, 0, {"netns": container.name}, "8080:80")
    is_whole(node, manager, container)
    container.command("ip", "route", "del", "default")  # something to repair
    with pytest.raises(ApiError, match="injected"):
        node.api.attach(JOB, 0, {"netns": container.name}, "8080:80;8081:81")
    assert node.api.attachments() == []
    assert node.api.status()["firewall"]["ports"] == 0
    until(lambda: manager.service(JOB)["instances"][0]["status"] != "up", "the cluster has it no more")
    node.api.attach(JOB, 0, {"netns": container.name}, "8080:80")
    is_whole(node, manager, container)
    assert node.api.status()["firewall"]["ports"] == 1


def start(node: Node, after: int = 0) -> None:
    """A supervisor that is a member; one that dies after so many commands, if that is not 0."""
    node.start("tests.supervisor.dying" if after else "appliance", after)
    ready(node)


def dies(node: Node, container: Netns, *, attach: bool) -> bool:
    """Attaches a container, or detaches it; whether the supervisor came to the command that it dies at."""
    with suppress(ApiError, OSError):
        if attach:
            node.api.attach(JOB, 0, {"netns": container.name})
        else:
            node.api.detach(JOB, 0)
        return False
    node.end()
    return True


def state_without_containers(node: Node, container: Netns) -> tuple[object, object, set[str]]:
    """What is there of a node that runs, to be compared: in the kernel and on the disk."""
    start(node)
    found = seen(node, container)
    node.end()
    return found


def seen(node: Node, container: Netns) -> tuple[object, object, set[str]]:
    """Links, addresses and routes of both namespaces, and the names of the node's files."""
    files = {str(it.relative_to(node.directory)) for it in node.directory.rglob("*")}
    return node.namespace.state(), container.state(), files - {"state/tables.json"}


def is_gone(node: Node, manager: Manager, container: Netns, clean: object) -> None:
    """Nothing is attached, here or in the cluster's eyes, and nothing is left of it."""
    assert node.api.attachments() == []
    until(lambda: manager.service(JOB)["instances"][0]["status"] != "up", "the cluster has none either")
    until(lambda: seen(node, container) == clean, f"nothing is left: {seen(node, container)}, was {clean}")


def is_whole(node: Node, manager: Manager, container: Netns) -> None:
    """The container is attached, with the addresses that the cluster says, and works."""
    (attached,) = node.api.attachments()
    (instance,) = until(
        lambda: [it for it in manager.service(JOB)["instances"] if it["status"] == "up"], "the cluster has it"
    )
    assert attached["address_v4"] in str(instance)
    assert attached["address_v6"] in str(instance)
    assert ping(container, attached["gateway_v4"])
