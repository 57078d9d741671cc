"""The mapping between topics and subjects, compared with the real server in both directions."""

import asyncio

import aiomqtt
import nats
import pytest
from nats.aio.msg import Msg

from appliance.cluster.manager.topics import REQUEST_TOPICS, to_filter, to_subject, to_topic
from tests.manager.processes import Cluster, Manager

PAIRS = [
    ("nodes/65f0000000000000000000a1/net/subnet", "nodes.65f0000000000000000000a1.net.subnet"),
    ("jobs/app.ns.srv.test/updates_available", "jobs.app//ns//srv//test.updates_available"),
    ("probe/a.b", "probe.a//b"),
    ("probe//b", "probe./.b"),
    ("/probe", "/.probe"),
    ("probe/", "probe./"),
]


@pytest.mark.parametrize(("topic", "subject"), PAIRS)
def test_both_directions(topic: str, subject: str) -> None:
    assert to_subject(topic) == subject
    assert to_topic(subject) == topic


def test_filters() -> None:
    assert [to_filter(one) for one in REQUEST_TOPICS[:2]] == ["nodes.*.net.subnet", "nodes.*.net.service.deployed"]


@pytest.mark.parametrize(("topic", "subject"), PAIRS)
def test_the_server_maps_alike(shared: Cluster, manager: Manager, topic: str, subject: str) -> None:
    async def main() -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()

        async def hear(message: Msg) -> None:
            heard.put_nowait(message.subject)

        client = await nats.connect(f"nats://127.0.0.1:{shared.nats}")
        await client.subscribe(">", cb=hear)
        await client.flush()
        async with asyncio.timeout(5), aiomqtt.Client("127.0.0.1", shared.mqtt) as mqtt:
            await mqtt.subscribe(topic)
            await mqtt.publish(topic, b"{}")
            while await heard.get() != subject:
                pass
            assert str((await anext(mqtt.messages)).topic) == topic
            await client.publish(subject, b"{}")
            assert str((await anext(mqtt.messages)).topic) == topic
        await client.close()

    asyncio.run(main())


def test_what_a_nats_client_publishes_arrives_with_qos_0(shared: Cluster, manager: Manager) -> None:
    """Why answers go through an MQTT client. If this fails one day, they need not any more."""

    async def main() -> None:
        client = await nats.connect(f"nats://127.0.0.1:{shared.nats}")
        async with asyncio.timeout(5), aiomqtt.Client("127.0.0.1", shared.mqtt) as mqtt:
            await mqtt.subscribe("probe/qos", qos=1)
            await client.publish("probe.qos", b"{}")
            assert (await anext(mqtt.messages)).qos == 0
            await mqtt.publish("probe/qos", b"{}", qos=1)
            assert (await anext(mqtt.messages)).qos == 1
        await client.close()

    asyncio.run(main())
