"""Three nodes of one cluster: what changes, and what goes on, while services are called."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from itertools import combinations
from typing import Any

import pytest

from appliance.lab import lifecycle, view
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import Family
from tests.conftest import ROOT
from tests.lab.conftest import CHANGING
from tests.lab.helpers import (
    FAMILIES,
    TIMEOUT_S,
    balanced,
    environment,
    leftovers,
    line,
    probe,
    program,
    until,
)

pytestmark = pytest.mark.root

SOON_S = 5.0
"""Within which a lost node's instances are not chosen any more, and what was changed without a broker is in force."""

MOVED_S = 0.1
"""Without an answer, at most, for a client whose instance was removed."""
REMOVALS = 4


@dataclass
class Load:
    """What a client has seen; filled in when its load ends."""

    calls: int = 0
    failures: list[tuple[float, str, str]] = field(default_factory=list)
    answers: dict[str, tuple[float, float]] = field(default_factory=dict)


@contextmanager
def load(lab: Lab, client: str) -> Iterator[Load]:
    """Calls the demo service from a client while the block runs."""
    seen, command = Load(), lab.command(client, program("caller", balanced("v4")))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(lab), cwd=ROOT, **pipes) as child:
        try:
            assert line(child) == "ready"
            time.sleep(0.3)
            yield seen
            time.sleep(0.3)
            output, _ = child.communicate(timeout=TIMEOUT_S)
        finally:
            child.kill()
    data = json.loads(output)
    seen.calls, seen.failures, seen.answers = data["calls"], data["failures"], data["answers"]


def answering(lab: Lab, client: str, family: Family = "v4") -> set[str]:
    """Who answers some calls of the service in a row."""
    return {it["container"] for it in probe(lab, client, balanced(family), 8)}


def test_three_nodes_are_members_with_subnets_of_their_own(three: Lab) -> None:
    nodes = view.data(three)["nodes"]
    assert [it["status"] for it in nodes] == ["online"] * 3
    for one, other in combinations(nodes, 2):
        for family in FAMILIES:
            subnets = [ip_network(it[f"subnet_{family}"]) for it in (one, other)]
            assert not subnets[0].overlaps(subnets[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_instance_is_reached_from_every_node(three: Lab, family: Family) -> None:
    for node in three.plan.nodes:
        assert answering(three, f"client{node.number}", family) == {"web0", "web1", "web2"}


def test_scaling_up_under_load_costs_no_call(three: Lab) -> None:
    with load(three, "client1") as seen:
        lifecycle.scale(CHANGING, "web", 5)
    lifecycle.scale(CHANGING, "web", 3)
    assert seen.failures == []
    assert set(seen.answers) == {"web0", "web1", "web2", "web3", "web4"}


def test_scaling_down_under_load_costs_no_call(three: Lab) -> None:
    """What goes is drained: it gets no new calls, and ends those that it has."""
    lifecycle.scale(CHANGING, "web", 5)
    with load(three, "client1") as seen:
        lifecycle.scale(CHANGING, "web", 3)
        changed = time.monotonic()
        assert {it["name"] for it in view.data(three)["containers"]} & {"web3", "web4"} == set()
    assert seen.failures == []
    assert max(seen.answers[it][1] for it in ("web3", "web4") if it in seen.answers) < changed
    assert leftovers(CHANGING)["namespaces"] == leftovers_of(three)


def leftovers_of(lab: Lab) -> list[str]:
    """The namespaces of a lab in the order in which `leftovers` has them."""
    known = set(lifecycle.opened(lab.plan.spec.name).plan.namespaces)
    return [it for it in leftovers(lab.plan.spec.name)["namespaces"] if it in known]


def test_known_services_go_on_without_the_cluster_and_changes_follow(three: Lab, outage: float) -> None:
    """What was attached meanwhile is called within SOON_S of the broker's return, and no call is lost."""
    web2 = three.plan.web[2]
    api = three.api(web2.node)
    api.detach(web2.service, web2.instance)
    until(lambda: not three.manager.picture().is_up(web2), "web2 is withdrawn")
    until(lambda: answering(three, "client1") == {"web0", "web1"}, "web2 is not called")
    with load(three, "client1") as seen:
        lifecycle.kill(CHANGING, "cluster")
        began = time.monotonic()
        time.sleep(outage / 2)
        api.attach(web2.service, web2.instance, {"netns": web2.namespace})
        time.sleep(outage / 2)
        lost = time.monotonic() - began
        lifecycle.start(CHANGING, "cluster")
        returned = time.monotonic()
        until(lambda: three.manager.picture().is_up(web2), "web2 is announced", SOON_S)
        time.sleep(1)
    assert lost >= outage
    assert [(began - returned, protocol, error) for began, protocol, error in seen.failures] == []
    assert seen.answers["web2"][0] - returned < SOON_S


def test_a_udp_client_that_never_stops_is_moved_at_once_when_its_instance_goes(three: Lab) -> None:
    """The best of some removals: a machine that is busy elsewhere may take longer."""
    gaps: list[float] = []
    while not gaps or (min(gaps) >= MOVED_S and len(gaps) < REMOVALS):
        gaps.append(gap_at_removal(three))
        until(lambda: answering(three, "client1") == {"web0", "web1", "web2"}, "all are called")
    assert min(gaps) < MOVED_S


def gap_at_removal(three: Lab) -> float:
    """Seconds for which one client's datagrams, one a millisecond from one socket, were not answered."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = three.command("client1", program("unstopped", balanced("v4")))
    with subprocess.Popen(command, env=environment(three), cwd=ROOT, **pipes) as client:
        try:
            assert line(client) == "ready"
            assert client.stdin is not None
            began = time.monotonic()
            client.stdin.write("\n")
            client.stdin.flush()
            before = line(client)
            gone = next(it for it in three.plan.web if it.name == before)
            three.api(gone.node).detach(gone.service, gone.instance)
            time.sleep(0.5)
            output, _ = client.communicate(timeout=TIMEOUT_S)
        finally:
            client.kill()
            three.api(gone.node).attach(gone.service, gone.instance, {"netns": gone.namespace})
    (old, _, last), (new, first, _), *more = json.loads(output)
    assert (old, more) == (before, [])
    assert new != old
    assert last > began
    return float(first - last)


def test_a_node_that_is_killed_is_avoided_and_returns_as_it_was(three: Lab) -> None:
    node = three.plan.nodes[1]
    subnets, attached = three.api(node).cluster()["subnets"], three.api(node).attachments()
    with load(three, "client1") as seen:
        killed = time.monotonic()
        lifecycle.kill(CHANGING, node.name)
        until(lambda: not three.manager.picture().is_up(three.plan.web[1]), "the cluster has lost it", SOON_S)
        until(lambda: avoided(three, "10.30.30.30", "web1"), "node1 does not choose it", SOON_S)
        avoided_after = time.monotonic() - killed
        time.sleep(1)
        lifecycle.start(CHANGING, node.name)
        until(lambda: three.manager.picture().is_up(three.plan.web[1]), "it is back", SOON_S)
        time.sleep(0.5)
    assert avoided_after < SOON_S
    assert all(began < killed + SOON_S for began, _, _ in seen.failures), (killed, seen.failures)
    assert three.api(node).cluster()["subnets"] == subnets
    assert three.api(node).attachments() == attached
    until(lambda: answering(three, "client1") == {"web0", "web1", "web2"}, "all are called")


def avoided(lab: Lab, address: str, container: str) -> bool:
    """Whether node 1 does not choose an instance."""
    placed = lab.manager.picture().placed(next(it for it in lab.plan.containers if it.name == container))
    services = {it["address"]: it["backends"] for it in lab.api(lab.plan.nodes[0]).services()}
    return placed.address_v4 not in services[address]


def test_a_node_without_its_cable_is_given_up_and_taken_back(three: Lab) -> None:
    """Silence, not an end of the connection: the broker has to find out."""
    lifecycle.plug(CHANGING, "node3", "down")
    try:
        until(lambda: not three.manager.picture().is_up(three.plan.web[2]), "the cluster has lost it", SOON_S + 1)
        until(lambda: answering(three, "client1") == {"web0", "web1"}, "it is not called", 2)
    finally:
        lifecycle.plug(CHANGING, "node3", "up")
    until(lambda: answering(three, "client1") == {"web0", "web1", "web2"}, "it is called again", 20)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: lifecycle.scale(CHANGING, "client", 2), "service: expected web"),
    (lambda: lifecycle.start(CHANGING, "node1"), "node1: expected one that has ended"),
    (lambda: lifecycle.kill(CHANGING, "web0"), "web0: expected one of cluster, node1, node2, node3"),
]


@pytest.mark.parametrize(("act", "complaint"), REFUSED, ids=[it[1] for it in REFUSED])
def test_what_cannot_be_done_is_one_sentence(three: Lab, act: Callable[[], object], complaint: str) -> None:
    with pytest.raises(lifecycle.LabError, match=complaint):
        act()
