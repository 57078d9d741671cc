"""Managers and brokers that end, gently or not, and come back: what was acknowledged is still there."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable

import nats
import pytest

from tests.manager.node import Node, connect
from tests.manager.processes import Cluster, Manager

NODE = "65f0000000000000000000a1"
JOB = "app.ns.srv.test"
Told = tuple[dict[str, object], dict[str, object]]
"""A node's subnet, and the answer to its query about the job."""


async def prepare(own: Cluster, manager: Manager) -> Told:
    """A node with a subnet and one instance, and what it was told."""
    manager.deploy(JOB)
    async with connect(own.mqtt, NODE) as node:
        return await announce(node)


async def announce(node: Node) -> Told:
    """The node's subnet, and the answer about the job as soon as its instance is in it."""
    subnet = await node.subnet()
    await node.deployed(JOB, 0, "10.18.0.2", "fc00::2")
    return subnet, await node.until(JOB, 1)


async def now(own: Cluster) -> Told:
    """What a node is told now."""
    async with connect(own.mqtt, NODE) as node:
        return await node.subnet(), await node.query(name=JOB)


def test_a_broker_that_is_killed_is_started_again_and_answers_come_again(own: Cluster) -> None:
    manager = own.manager()
    before = asyncio.run(prepare(own, manager))
    own.kill_server()
    wait_for(lambda: not is_well(manager))
    wait_for(lambda: is_well(manager))
    assert asyncio.run(now(own)) == before
    assert manager.process.popen.poll() is None


def test_a_deployment_while_the_broker_is_away_waits_for_it(own: Cluster) -> None:
    manager = own.manager()
    own.kill_server()
    made = manager.deploy(JOB, 3)
    assert [instance["number"] for instance in made["instances"]] == [0, 1, 2]


def test_announcements_wait_for_a_manager(own: Cluster) -> None:
    """A node announces an instance once, and the broker has acknowledged it."""
    own.broker()
    manager = own.manager(own_broker=False)
    manager.deploy(JOB)
    manager.process.stop()

    async def announce() -> None:
        async with connect(own.mqtt, NODE) as node:
            await node.deployed(JOB, 0, "10.18.0.2", "fc00::2")

    asyncio.run(announce())
    again = own.manager(own_broker=False)
    wait_for(lambda: again.service(JOB)["instances"][0]["status"] == "up")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_manager_with_its_broker_comes_back_with_everything(own: Cluster, number: int) -> None:
    """That the broker ended all connections says nothing about the nodes; that one does not come back does."""
    manager = own.manager()
    manager.deploy(JOB)

    async def main() -> Told:
        async with connect(own.mqtt, NODE, will=True) as node:
            told = await announce(node)
            assert manager.process.stop(number) == (0 if number == signal.SIGTERM else -number)
            await node.cut_off()
            return told

    before = asyncio.run(main())
    again = own.manager("--roll-call", "1")
    assert asyncio.run(now(own)) == before
    wait_for(lambda: again.service(JOB)["instances"][0]["status"] == "lost")


def test_a_second_broker_on_the_same_store_is_refused(own: Cluster) -> None:
    own.manager()
    with pytest.raises(AssertionError, match="expected a state directory that no other broker uses"):
        own.broker()


def test_a_port_that_is_taken_is_one_sentence(own: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match=r"appliance cluster: .*address already in use") as caught:
            own.start("run", ["--rest", f"127.0.0.1:{port}"])
    assert "Traceback" not in str(caught.value)


def test_a_manager_ends_at_once_also_during_a_roll_call(own: Cluster) -> None:
    manager = own.manager()
    own.kill_server()
    wait_for(lambda: not is_well(manager))
    wait_for(lambda: is_well(manager))
    begun = time.monotonic()
    assert manager.process.stop(signal.SIGTERM) == 0
    assert time.monotonic() - begun < 10


def test_a_document_that_cannot_be_read_stops_decisions(own: Cluster) -> None:
    manager = own.manager()
    manager.deploy(JOB)

    async def spoil() -> None:
        client = await nats.connect(f"nats://127.0.0.1:{own.nats}")
        await client.jetstream().publish(f"$KV.edge-cluster.job.{JOB}", b'{"service_ips": 7}')
        await client.close()

    asyncio.run(spoil())
    status, answer = manager.call("GET", "/v1/services")
    assert (status, f"job.{JOB}: expected a job" in answer["error"]) == (503, True)


def is_well(manager: Manager) -> bool:
    """What /healthz says."""
    return manager.call("GET", "/healthz")[0] == 200


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
