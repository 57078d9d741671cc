"""Two managers on one broker, one of them killed in the middle: no request is lost, nothing is given twice."""

import asyncio
import signal
from collections import Counter
from ipaddress import IPv4Network

from tests.manager.node import Node, connect
from tests.manager.processes import Cluster, Manager

NODES = 40
SUBNET_REQUESTS = 3
"""By each node: 120 in all."""
JOBS = 60
QUERIES = 5
"""By each node: 200 in all."""
RETRY_S = 4.0
"""A manager's messages are handed to the other after 2 s, so a requester hardly ever has to ask again."""


def manager_pair(own: Cluster) -> tuple[Manager, Manager]:
    """A broker with two managers."""
    own.broker()
    return own.manager(own_broker=False), own.manager(own_broker=False)


async def persistent(node: Node, kind: str, payload: object, end: str) -> dict[str, object]:
    """An answer, asked for again if it does not come."""
    while True:
        await node.say(kind, payload)
        try:
            return dict((await node.hear(end, RETRY_S)).payload)
        except TimeoutError:
            continue


async def ask_everything(port: int, number: int) -> tuple[set[str], list[dict[str, object]]]:
    """One node's requests: its subnets each time, and the answers to its queries."""
    async with connect(port, f"{number:024x}") as node:
        given, answers = set(), []
        for _ in range(SUBNET_REQUESTS):
            answer = await persistent(node, "subnet", {"METHOD": "GET"}, "/subnetwork/result")
            given.add(f"{answer['address']} {answer['addressv6']}")
        for turn in range(QUERIES):
            job = f"app.ns.srv{(number + turn) % JOBS}.test"
            answers.append(await persistent(node, "tablequery/request", {"sname": job}, "/tablequery/result"))
        return given, answers


async def deploy_all(first: Manager, second: Manager) -> list[dict[str, object]]:
    """Services deployed through both managers at once; each again through the other if one is gone."""

    def deploy(number: int) -> dict[str, object]:
        chosen = (first, second)[number % 2]
        try:
            return chosen.deploy(f"app.ns.srv{number}.test", 2)
        except OSError:
            return second.deploy(f"app.ns.srv{number}.test", 2)

    loop = asyncio.get_running_loop()
    return list(await asyncio.gather(*(loop.run_in_executor(None, deploy, number) for number in range(JOBS))))


async def kill_in_the_middle(first: Manager) -> None:
    """Kills a manager when it has done a part of its work."""
    while first.call("GET", "/healthz")[1]["messages"].get("taken", 0) < 20:  # noqa: ASYNC110  # another process
        await asyncio.sleep(0.01)
    first.process.stop(signal.SIGKILL)


def test_a_killed_manager_loses_nothing_and_nothing_is_given_twice(own: Cluster) -> None:
    first, second = manager_pair(own)

    async def main() -> tuple[list[tuple[set[str], list[dict[str, object]]]], list[dict[str, object]]]:
        async with asyncio.timeout(40):
            asked = asyncio.gather(*(ask_everything(own.mqtt, number) for number in range(NODES)))
            deployed = asyncio.create_task(deploy_all(first, second))
            killed = asyncio.create_task(kill_in_the_middle(first))
            results = await asked
            await killed
            return results, await deployed

    results, _ = asyncio.run(main())
    assert first.process.popen.returncode == -signal.SIGKILL
    for given, answers in results:
        assert len(given) == 1, "a node got different subnets"
        assert len(answers) == QUERIES
    leases = Counter(next(iter(given)) for given, _ in results)
    assert len(leases) == NODES, "a subnet was given twice"
    check_leases(second, leases)
    check_addresses(second)


def check_leases(manager: Manager, leases: Counter[str]) -> None:
    """What the nodes were told is what the manager has."""
    nodes = manager.call("GET", "/v1/nodes")[1]["nodes"]
    networks = [IPv4Network(node["subnet_v4"]) for node in nodes]
    assert {str(network.network_address) for network in networks} == {lease.split()[0] for lease in leases}
    assert len(set(networks)) == NODES


def check_addresses(manager: Manager) -> None:
    """No address of a service or an instance exists twice."""
    services = manager.call("GET", "/v1/services")[1]["services"]
    assert len(services) == JOBS
    holders = [it for service in services for it in (*service["service_ips"], *service["instances"])]
    for family in ("v4", "v6"):
        addresses = [it[family] for it in holders]
        assert len(set(addresses)) == len(addresses) == 3 * JOBS


def test_both_managers_take_their_share(own: Cluster) -> None:
    managers = manager_pair(own)

    async def main() -> None:
        await asyncio.gather(*(ask_everything(own.mqtt, number) for number in range(10)))

    asyncio.run(main())
    shares = [manager.call("GET", "/healthz")[1]["messages"].get("taken", 0) for manager in managers]
    assert sum(shares) == 10 * (SUBNET_REQUESTS + QUERIES)
    assert min(shares) > 0
