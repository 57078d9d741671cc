"""The list of all nodes that managers retain: true whatever ends and comes back."""

import asyncio
import signal
from contextlib import AsyncExitStack

import aiomqtt
import orjson
import pytest

from appliance.cluster.manager import topics
from tests.manager.node import Node, connect
from tests.manager.processes import Cluster

A, B = "65f0000000000000000000a1", "65f0000000000000000000b2"
JOB = "app.ns.srv.test"
SECONDS = 20.0


def reached(host: str, port: int = 50103, subnets: int = 0) -> dict[str, object]:
    """What the list says of a node of ours."""
    given = ["10.18.0.0/26", "fc00::/120"][:subnets]
    return {"host_ip": host, "host_port": port, "subnets": given, "overlay": 2}


async def come(node: Node, host: str) -> None:
    """A node of ours says where it is reached."""
    await node.say("status", {"status": "online", "host_ip": host, "host_port": "50103"}, retain=True)


async def read(own: Cluster, seconds: float = 0.3) -> dict[str, object]:
    """What is retained: what a node hears that connects now."""
    found: dict[str, object] = {}
    async with aiomqtt.Client("127.0.0.1", own.mqtt) as client:
        await client.subscribe(topics.ALL_NODES, qos=1)
        try:
            async with asyncio.timeout(seconds):
                async for it in client.messages:
                    assert it.retain, "nothing changes meanwhile"
                    assert isinstance(it.payload, bytes)
                    found[str(it.topic).removeprefix(topics.LISTED)] = orjson.loads(it.payload)
        except TimeoutError:
            pass
    return found


async def until(own: Cluster, wanted: dict[str, object]) -> None:
    """Waits until the list says this."""
    found: dict[str, object] = {}
    try:
        async with asyncio.timeout(SECONDS):
            while found != wanted:
                try:
                    found = await read(own)
                except (aiomqtt.MqttError, AssertionError):
                    await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"expected {wanted}, got {found}") from None


def test_nodes_come_move_and_go(own: Cluster) -> None:
    own.manager()

    async def test() -> None:
        async with connect(own.mqtt, A, will=True) as a:
            await come(a, "192.0.2.1")
            await until(own, {A: reached("192.0.2.1")})
            async with connect(own.mqtt, B, will=True) as b:
                await come(b, "192.0.2.2")
                await until(own, {A: reached("192.0.2.1"), B: reached("192.0.2.2")})
                await come(b, "192.0.2.3")
                await until(own, {A: reached("192.0.2.1"), B: reached("192.0.2.3")})
                await b.unplug()
            await until(own, {A: reached("192.0.2.1")})

    asyncio.run(test())


def test_an_existing_node_is_listed_by_its_instances_and_not_as_ours(own: Cluster) -> None:
    manager = own.manager()
    manager.deploy(JOB)

    async def test() -> None:
        async with connect(own.mqtt, A) as node:
            await node.deployed(JOB, 0, "10.18.0.2", "fc00::2", host="192.0.2.7")
            await until(own, {A: {**reached("192.0.2.7"), "overlay": 1}})
            manager.call("DELETE", f"/v1/services/{JOB}")
            await until(own, {})

    asyncio.run(test())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_happens_while_no_manager_runs_is_listed_by_the_next_one(own: Cluster, number: signal.Signals) -> None:
    own.broker()
    first = own.manager(own_broker=False)

    async def test() -> None:
        async with connect(own.mqtt, A, will=True) as a, AsyncExitStack() as stack:
            b = await stack.enter_async_context(connect(own.mqtt, B, will=True))
            await come(a, "192.0.2.1")
            await come(b, "192.0.2.2")
            await until(own, {A: reached("192.0.2.1"), B: reached("192.0.2.2")})
            await asyncio.to_thread(first.process.stop, number)
            await come(a, "192.0.2.9")
            await b.unplug()
            await asyncio.to_thread(lambda: own.manager(own_broker=False))
            await until(own, {A: reached("192.0.2.9")})

    asyncio.run(test())


def test_what_somebody_wrote_there_is_corrected(own: Cluster) -> None:
    own.manager()

    async def test() -> None:
        async with connect(own.mqtt, A, will=True) as a:
            await come(a, "192.0.2.1")
            await until(own, {A: reached("192.0.2.1")})
            await a.client.publish(topics.listed(A), b"", qos=1, retain=True)
            await a.client.publish(topics.listed(B), b'{"host_ip":"192.0.2.66"}', qos=1, retain=True)
            await until(own, {A: reached("192.0.2.1")})

    asyncio.run(test())


def test_two_managers_agree_and_either_may_die(own: Cluster) -> None:
    own.broker()
    first, _ = own.manager(own_broker=False), own.manager(own_broker=False)

    async def test() -> None:
        async with connect(own.mqtt, A, will=True) as a:
            for number in range(1, 10):
                await come(a, f"192.0.2.{number}")
            await until(own, {A: reached("192.0.2.9")})
            await asyncio.to_thread(first.process.stop, signal.SIGKILL)
            await come(a, "192.0.2.10")
            await until(own, {A: reached("192.0.2.10")})

    asyncio.run(test())


def test_a_broker_that_is_killed_loses_no_entry_that_is_true(own: Cluster) -> None:
    own.manager("--roll-call", "2")

    async def test() -> None:
        async with connect(own.mqtt, A, will=True) as a, connect(own.mqtt, B, will=True) as b:
            await come(a, "192.0.2.1")
            await come(b, "192.0.2.2")
            await until(own, {A: reached("192.0.2.1"), B: reached("192.0.2.2")})
            own.kill_server()
            await a.cut_off()
            await b.cut_off()
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(SECONDS):
                while True:
                    try:
                        a = await stack.enter_async_context(connect(own.mqtt, A, will=True))
                        break
                    except aiomqtt.MqttError:
                        await asyncio.sleep(0.1)
            await come(a, "192.0.2.1")
            await until(own, {A: reached("192.0.2.1")})  # B did not come back: the roll call takes it off

    asyncio.run(test())
