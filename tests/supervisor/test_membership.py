"""Supervisors as members of a real cluster, in the real kernel."""

import re

import pytest

from appliance import limits
from appliance.client import ApiError
from tests.supervisor.world import SETTLE_S, World, ping, ready, saved, until

pytestmark = pytest.mark.root

JOB, OTHER_JOB = "app.ns.web.test", "app.ns.shop.test"
ONE, TWO = "65f0000000000000000000a1", "65f0000000000000000000b2"
RR = "10.30.30.30"


def test_a_node_gets_its_subnets_and_announces_what_is_attached(hub: World) -> None:
    manager = hub.manager()
    manager.deploy(JOB, 1, service_ips={"rr": {"v4": RR}})
    node, container = hub.member(ONE).start(), hub.container()
    ready(node)
    attached = node.api.attach(JOB, 0, {"netns": container.name})
    subnets = node.api.cluster()["subnets"]
    assert len(subnets) == 2
    assert saved(node, "subnetwork.json")["subnetwork"]["address"] == subnets[0].partition("/")[0]
    (instance,) = until(lambda: [it for it in manager.service(JOB)["instances"] if it["status"] == "up"], "announced")
    assert attached["address_v4"] in str(instance)
    assert node.hosts()[attached["address_v4"]]["local"]
    until(lambda: RR in {it["address"] for it in node.api.services()}, "the node knows its own service")
    assert ping(container, attached["gateway_v4"])
    node.api.detach(JOB, 0)
    until(lambda: manager.service(JOB)["instances"][0]["status"] != "up", "withdrawn")
    until(lambda: node.hosts() == {}, "withdrawn here too")
    assert node.stop() == 0


def test_two_nodes_call_each_other(hub: World) -> None:
    manager = hub.manager()
    manager.deploy(JOB, 1, service_ips={"rr": {"v4": RR}})
    manager.deploy(OTHER_JOB, 1)
    one, two = hub.member(ONE), hub.member(TWO)
    one.start()
    two.start()
    server, client = hub.container(), hub.container()
    for node, job, container in ((one, JOB, server), (two, OTHER_JOB, client)):
        ready(node)
        node.api.attach(job, 0, {"netns": container.name})
    until(lambda: manager.service(JOB)["instances"][0]["status"] == "up", "announced")
    assert two.api.resolve(RR)["found"]
    assert one.api.need(OTHER_JOB)
    assert ping(client, RR)


def test_a_node_without_subnets_answers_and_says_what_it_waits_for(hub: World) -> None:
    node, container = hub.member(ONE).start(), hub.container()
    with pytest.raises(ApiError, match=re.escape("subnets: expected an answer of the cluster at mqtt://192.0.2.254")):
        node.api.attach(JOB, 0, {"netns": container.name})
    assert not node.api.cluster()["ready"]
    hub.manager().deploy(JOB, 1)
    ready(node)
    node.api.attach(JOB, 0, {"netns": container.name})
    assert ping(container, node.api.attachments()[0]["gateway_v4"])


def test_a_restart_without_the_cluster_keeps_subnets_containers_and_services(hub: World) -> None:
    manager = hub.manager()
    manager.deploy(JOB, 1, service_ips={"rr": {"v4": RR}})
    manager.deploy(OTHER_JOB, 1)
    one, two = hub.member(ONE, cluster={"interest": 60}), hub.member(TWO, cluster={"interest": 60})
    one.start()
    two.start()
    server, client = hub.container(), hub.container()
    for node, job, container in ((one, JOB, server), (two, OTHER_JOB, client)):
        ready(node)
        node.api.attach(job, 0, {"netns": container.name})
    until(lambda: two.api.resolve(RR)["found"], "the service is known")
    assert one.api.need(OTHER_JOB)
    assert ping(client, RR)
    subnets, attached = two.api.cluster()["subnets"], two.api.attachments()
    until(lambda: RR in str(saved(two, "tables.json")), "what is known is on disk")
    manager.process.stop()
    assert ping(client, RR), "known services go on"
    two.stop()
    two.start()
    status = two.api.cluster()
    assert not status["connected"]
    assert status["subnets"] == subnets
    assert two.api.attachments() == attached
    assert two.api.status()["tables"]["staleness"] > 0
    assert ping(client, RR)
    again = hub.manager()
    until(lambda: again.service(OTHER_JOB)["instances"][0]["status"] == "up", "adopted containers are announced")
    until(lambda: two.api.status()["tables"]["staleness"] == 0, "everything is fresh again")


def test_a_node_that_is_unplugged_has_left_within_5_s(hub: World) -> None:
    manager = hub.manager()
    manager.deploy(JOB, 1)
    one, two = hub.member(ONE).start(), hub.member(TWO, cluster={"interest": 60}).start()
    ready(one)
    address = one.api.attach(JOB, 0, {"netns": hub.container().name})["address_v4"]
    until(lambda: two.api.need(JOB), "known on the other node")
    hub.unplug(one)
    until(lambda: address not in two.hosts(), "gone from the other node's tables", 5)
    hub.plug(one)
    until(lambda: address in two.hosts(), "back")


def test_use_keeps_an_interest_and_the_lack_of_it_ends_it(hub: World) -> None:
    manager = hub.manager()
    manager.deploy(JOB, 1, service_ips={"rr": {"v4": RR}})
    manager.deploy(OTHER_JOB, 1)
    one, two = hub.member(ONE).start(), hub.member(TWO, cluster={"interest": 2}).start()
    ready(one)
    ready(two)
    client = hub.container()
    one.api.attach(JOB, 0, {"netns": hub.container().name})
    two.api.attach(OTHER_JOB, 0, {"netns": client.name})
    until(lambda: two.api.resolve(RR)["found"], "the service is known")
    assert one.api.need(OTHER_JOB)
    assert ping(client, RR, count=25), "5 s, and no other sign of use than the flow"
    assert JOB in {it["job"] for it in two.api.cluster()["interests"]}

    def given_up() -> bool:
        return JOB not in {it["job"] for it in two.api.cluster()["interests"]}

    until(given_up, "given up once the flow is over", limits.ICMP_TIMEOUT / limits.SECOND + SETTLE_S)


def test_what_a_person_typed_wrong_is_named(hub: World) -> None:
    node = hub.node(network={"subnet_v4": "10.18.0.0/26"}).start()
    with pytest.raises(ApiError, match=r"^job: "):
        node.api.need("web")
    with pytest.raises(ApiError, match=r"^address: expected an IP address, got 'web'$"):
        node.api.resolve("web")
    assert not node.api.cluster()["member"]
    assert not node.api.need(JOB)
    assert not node.api.resolve(RR)["found"]
