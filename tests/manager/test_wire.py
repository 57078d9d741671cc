"""What a node sees on the wire, topic by topic, against a real manager and broker."""

import asyncio
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Network, IPv6Network
from itertools import count
from typing import Any

import pytest
from click.testing import CliRunner

from appliance.cli import main
from tests.manager.node import Node, Received, connect
from tests.manager.processes import Cluster, Manager

_numbers = count(1)


def node_id() -> str:
    """A node id that no other test uses."""
    return f"{next(_numbers):024x}"


def job_name() -> str:
    """A job name that no other test uses."""
    return f"app.ns.srv{next(_numbers)}.test"


def play(shared: Cluster, scene: Callable[[Node], Awaitable[None]], *, will: bool = False) -> None:
    """Runs a scene with one connected node."""

    async def main() -> None:
        async with connect(shared.mqtt, node_id(), will=will) as node:
            await scene(node)

    asyncio.run(main())


async def place(node: Node, job: str, number: int, offset: int = 2) -> list[str]:
    """Gets the node's subnets and announces an instance at an offset into them; its addresses."""
    v4, v6 = subnets(await node.subnet())
    addresses = [str(v4[offset]), str(v6[offset])]
    await node.deployed(job, number, *addresses)
    return addresses


def subnets(answer: dict[str, object]) -> tuple[IPv4Network, IPv6Network]:
    """The networks that an answer about subnets means."""
    v4, v6 = f"{answer['address']}/{answer['prefix']}", f"{answer['addressv6']}/{answer['prefixv6']}"
    return IPv4Network(v4), IPv6Network(v6)


def test_a_subnet_is_answered_with_its_addresses_alone_and_qos_1(shared: Cluster, manager: Manager) -> None:
    async def scene(node: Node) -> None:
        await node.say("subnet", {"METHOD": "GET"})
        received = await node.hear("/net/subnetwork/result")
        assert (received.qos, received.retain) == (1, False)
        assert received.topic == f"nodes/{node.name}/net/subnetwork/result"
        assert set(received.payload) == {"address", "addressv6", "prefix", "prefixv6"}
        v4, v6 = subnets(received.payload)
        assert v4.subnet_of(IPv4Network("10.18.0.0/15"))
        assert (v4.prefixlen, v6.prefixlen) == (26, 120)
        assert v6.subnet_of(IPv6Network("fc00::/8"))

    play(shared, scene)


def test_a_node_gets_the_same_subnet_again_and_another_node_another(shared: Cluster, manager: Manager) -> None:
    async def main() -> None:
        one, other = node_id(), node_id()
        async with connect(shared.mqtt, one) as node:
            first = await node.subnet()
            assert await node.subnet() == first
        async with connect(shared.mqtt, one) as node, connect(shared.mqtt, other) as second:
            assert await node.subnet() == first
            assert not subnets(first)[0].overlaps(subnets(await second.subnet())[0])

    asyncio.run(main())


def test_giving_a_subnet_back_is_ignored(shared: Cluster, manager: Manager) -> None:
    async def scene(node: Node) -> None:
        first = await node.subnet()
        await node.say("subnet", {"METHOD": "DELETE"})
        assert await node.silence(0.3) == []
        assert await node.subnet() == first

    play(shared, scene)


def test_a_table_query_answers_as_existing_clusters_do(shared: Cluster, manager: Manager) -> None:
    async def scene(node: Node) -> None:
        job = job_name()
        service = manager.deploy(job, 2)
        rr, (first, second) = service["service_ips"][0], service["instances"]
        await place(node, job, 0)
        await node.listen(job)
        answer = await node.until(job, 1)
        v4, v6 = subnets(await node.subnet())
        place_of_first = {
            "worker_id": node.name,
            "namespace_ip": str(v4[2]),
            "namespace_ip_v6": str(v6[2]),
            "host_ip": "192.0.2.1",
            "host_port": 50103,
        }
        assert answer == {
            "app_name": job,
            "instance_list": [{**listed(0, first, rr), **place_of_first}, listed(1, second, rr)],
            "query_key": job,
        }

    play(shared, scene)


def listed(number: int, instance: dict[str, Any], rr: dict[str, Any]) -> dict[str, Any]:
    """An instance that does not run yet: a node needs its addresses before it does."""
    own = {"IpType": "instance_ip", "Address": instance["v4"], "Address_v6": instance["v6"]}
    return {
        "instance_number": number,
        "instance_ip": instance["v4"],
        "instance_ip_v6": instance["v6"],
        "cluster_id": "edge",
        "service_ip": [{"IpType": "RR", "Address": rr["v4"], "Address_v6": rr["v6"]}, own],
    }


def test_an_address_is_found_however_it_is_spelled(shared: Cluster, manager: Manager) -> None:
    async def scene(node: Node) -> None:
        job = job_name()
        service = manager.deploy(job)
        for address in (service["service_ips"][0]["v4"], service["instances"][0]["v6"]):
            assert (await node.query(address=address))["app_name"] == job
        spelled = service["service_ips"][0]["v6"].replace("fdff:2000::", "FDFF:2000:0000:0::")
        answer = await node.query(address=spelled)
        assert (answer["app_name"], answer["query_key"]) == (job, spelled)

    play(shared, scene)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ({"address": "10.30.99.99"}, {"app_name": "", "instance_list": [], "query_key": "10.30.99.99"}),
        ({"address": "no address"}, {"app_name": "", "instance_list": [], "query_key": "no address"}),
        ({"name": "a.b.c.d"}, {"app_name": "a.b.c.d", "instance_list": [], "query_key": "a.b.c.d"}),
    ],
)
def test_what_does_not_exist_gets_an_empty_answer(
    shared: Cluster, manager: Manager, question: dict[str, str], answer: dict[str, object]
) -> None:
    async def scene(node: Node) -> None:
        assert await node.query(**question) == answer

    play(shared, scene)


def test_an_instance_that_is_not_deployed_is_listed_without_a_place(shared: Cluster, manager: Manager) -> None:
    async def scene(node: Node) -> None:
        job = job_name()
        manager.deploy(job, 3)
        before = (await node.query(name=job))["instance_list"]
        assert [sorted(it) for it in before] == 3 * [
            ["cluster_id", "instance_ip", "instance_ip_v6", "instance_number", "service_ip"]
        ]
        await place(node, job, 1)
        after = (await node.until(job, 1))["instance_list"]
        assert [it["instance_ip"] for it in after] == [it["instance_ip"] for it in before]
        assert await node.numbers(job) == [1]

    play(shared, scene)


def test_followers_hear_of_each_change(shared: Cluster, manager: Manager) -> None:
    async def scene(node: Node) -> None:
        job = job_name()
        topic = f"jobs/{job}/updates_available"
        await node.listen(job)
        manager.deploy(job)
        assert await node.hear(topic) == Received(topic, {"type": "DEPLOYMENT"}, 1, False)
        addresses = await place(node, job, 0)
        assert (await node.hear(topic)).payload == {"type": "DEPLOYMENT"}
        await node.say("service/undeployed", {"appname": job, "instance_number": 0})
        assert (await node.hear(topic)).payload == {"type": "UNDEPLOYMENT", "gone": addresses}
        assert await node.numbers(job) == []
        manager.call("DELETE", f"/v1/services/{job}")
        assert (await node.hear(topic)).payload == {"type": "UNDEPLOYMENT"}

    play(shared, scene)


@pytest.mark.parametrize("named", ["job", "app"])
def test_a_new_address_of_the_node_counts_for_all_its_instances(shared: Cluster, manager: Manager, named: str) -> None:
    """Existing nodes name only the first part of the job."""

    async def scene(node: Node) -> None:
        job = job_name()
        manager.deploy(job)
        await place(node, job, 0)
        await node.until(job, 1)
        await node.listen(job)
        moved = {"nsip": "", "nsipv6": "", "status": "", "instance_number": 0, "host_port": "50104"}
        name = job if named == "job" else "app"
        await node.say("service/address-changed", {"appname": name, "host_ip": "192.0.2.99", **moved})
        await node.hear("/updates_available")
        instance = (await node.query(name=job))["instance_list"][0]
        assert (instance["host_ip"], instance["host_port"]) == ("192.0.2.99", 50104)

    play(shared, scene)


def test_a_node_without_ipv6_is_listed_without_it(shared: Cluster, manager: Manager) -> None:
    async def scene(node: Node) -> None:
        job = job_name()
        manager.deploy(job)
        v4, _ = subnets(await node.subnet())
        await node.deployed(job, 0, str(v4[2]), "<nil>")
        instance = (await node.until(job, 1))["instance_list"]
        assert isinstance(instance, list)
        assert "namespace_ip_v6" not in instance[0]

    play(shared, scene)


def test_undeploying_says_that_it_drains_and_need_not(shared: Cluster, manager: Manager) -> None:
    def said(job: str, *options: str) -> str:
        done = CliRunner().invoke(main, ["undeploy", job, "--manager", manager.url, *options])
        assert done.exit_code == 0, done.output
        return done.output

    async def scene(node: Node) -> None:
        short, long = job_name(), job_name()
        for offset, (job, drain) in enumerate(((short, 0.3), (long, 600))):
            manager.deploy(job, drain=drain)
            await place(node, job, 0, offset + 2)
            await node.until(job, 1)
            assert said(job) == f"{job} drains\n"
            assert (await node.query(name=job))["instance_list"][0]["state"] == "draining"
        await node.until(short, 0)
        assert manager.call("GET", f"/v1/services/{short}")[0] == 404
        assert manager.call("DELETE", f"/v1/services/{long}?now=maybe")[0] == 400
        assert manager.service(long)["leaving"]
        assert said(long, "--now") == ""
        assert manager.call("GET", f"/v1/services/{long}")[0] == 404

    play(shared, scene)


def test_nothing_makes_the_manager_deaf(shared: Cluster, manager: Manager) -> None:
    """Existing clusters stop listening at the first payload that is no JSON, or at an interest that is not there."""
    kinds = ("subnet", "service/deployed", "service/address-changed", "tablequery/request", "interest/remove", "status")
    wrong = (b"", b"\xff\xfe", b"{", b"[]", b"null", b'"text"', b"{}", b'{"METHOD": 1, "appname": [], "status": "x"}')

    async def scene(node: Node) -> None:
        await node.say("subnet", {"METHOD": "GET"})
        await node.hear("/net/subnetwork/result")
        for kind in kinds:
            for payload in wrong:
                await node.say(kind, payload)
        for _ in range(2):
            await node.say("interest/remove", {"appname": "a.b.c.d"})
            await node.say("interest/remove", {"appname": "10.30.0.1"})
        await node.client.publish("nodes/a.b/net/subnet", b'{"METHOD":"GET"}', qos=1)
        await node.subnet()

    before = manager.call("GET", "/healthz")[1]["messages"].get("bad", 0)
    play(shared, scene)
    assert manager.call("GET", "/healthz")[1]["messages"]["bad"] - before > len(kinds) * len(wrong) - 10


def test_only_what_was_deployed_can_be_announced(shared: Cluster, manager: Manager) -> None:
    async def scene(node: Node) -> None:
        job = job_name()
        manager.deploy(job)
        v4, v6 = subnets(await node.subnet())
        await node.deployed(job_name(), 0, str(v4[2]), str(v6[2]))
        await node.deployed(job, 7, str(v4[2]), str(v6[2]))
        await node.deployed(job, 0, "10.29.255.2", "fc77::2")
        assert await node.silence(0.3) == []
        assert await node.numbers(job) == []

    play(shared, scene)


def test_interests_are_kept_and_removed(shared: Cluster, manager: Manager) -> None:
    async def scene(node: Node) -> None:
        job = job_name()
        manager.deploy(job)
        await node.query(name=job)
        assert manager.service(job)["interested"] == [node.name]
        await node.say("interest/remove", {"appname": job})
        await node.subnet()
        assert manager.service(job)["interested"] == []

    play(shared, scene)


def test_a_lost_node_takes_its_instances_along_until_it_announces_them_again(shared: Cluster, manager: Manager) -> None:
    async def main() -> None:
        job, name = job_name(), node_id()
        manager.deploy(job)
        async with connect(shared.mqtt, node_id()) as watcher:
            await watcher.listen(job)
            async with connect(shared.mqtt, name, will=True) as node:
                addresses = await place(node, job, 0)
                await watcher.until(job, 1)
                await watcher.silence(0.1)
                await node.unplug()
            told = {"type": "UNDEPLOYMENT", "gone": addresses}
            assert (await watcher.hear("/updates_available", 2)).payload == told
            assert await watcher.numbers(job) == []
            async with connect(shared.mqtt, name, will=True) as node:
                assert await watcher.numbers(job) == []
                await place(node, job, 0)
                assert (await watcher.hear("/updates_available", 2)).payload == {"type": "DEPLOYMENT"}
                assert await watcher.numbers(job) == [0]

    asyncio.run(main())


def test_a_node_follows_more_services_than_a_broker_lets_it_by_itself(shared: Cluster, manager: Manager) -> None:
    """nats-server refuses a session's 64th subscription, and the 1,001st of all nodes together, if nobody says more."""
    followed = [(f"jobs/{job_name()}/updates_available", 1) for _ in range(1_100)]

    async def scene(node: Node) -> None:
        codes = await node.client.subscribe(followed, timeout=30)
        assert {getattr(code, "value", code) for code in codes} == {1}

    play(shared, scene)
