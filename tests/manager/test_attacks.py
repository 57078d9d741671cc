"""What somebody with one node's certificate and key can do to the others: nothing.

One's credentials against two, which is a member with certificates of the same authority. A witness with the manager's
credentials hears everything, so that what gets through is seen wherever it goes.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiomqtt
import nats
import pytest

from appliance.cluster.manager import pki
from tests.cluster.member import Subject, config, run, started
from tests.manager.processes import Cluster
from tests.manager.test_pki import JOB, ONE, TWO, connected, context, heard, init, subscribed

EVIL = b'{"status": "offline", "METHOD": "GET"}'
ANOTHERS = f"nodes/{TWO}/net"
READS = (
    *(f"{ANOTHERS}/{kind}" for kind in ("subnetwork/result", "tablequery/result", "status", "tablequery/request", "#")),
    *("#", "+/#", "nodes/#", "nodes/+/net/#", "nodes/+/net/subnetwork/result", "+/+/net/tablequery/result"),
    *(f"nodes/{ONE}/net/#", f"nodes/{ONE}/net/status", "jobs/#", f"jobs/{JOB}/#", "cluster/#"),
    *("$SYS/#", "$JS/#", "$JS/API/#", "$KV/#", "$MQTT/#", "$MQTT/sub/#", "$MQTT/msgs/#", "$MQTT/rmsgs/#", "_INBOX/#"),
    *(f"$share/group/{ANOTHERS}/subnetwork/result", "$share/group/#", "/#", "+", f"{ANOTHERS}/subnetwork/+"),
)
"""Filters that would show what is not one's own."""
WRITES = (
    *(f"{ANOTHERS}/{kind}" for kind in ("subnet", "status", "service/deployed", "service/undeployed")),
    *(f"{ANOTHERS}/{kind}" for kind in ("service/health", "tablequery/request", "interest/remove")),
    *(f"{ANOTHERS}/{kind}" for kind in ("subnetwork/result", "tablequery/result", "service/address-changed")),
    *(f"nodes/{ONE}/net/subnetwork/result", f"nodes/{ONE}/net/tablequery/result", f"nodes/{ONE}/net", f"nodes/{ONE}"),
    *(f"jobs/{JOB}/updates_available", f"cluster/nodes/{TWO}", f"cluster/nodes/{ONE}", f"cluster/exposed/{JOB}"),
    *("$JS/API/STREAM/LIST", "$JS/API/STREAM/DELETE/$MQTT_rmsgs", "$KV/services/x", "$SYS/REQ/SERVER/PING", "a"),
    *("$MQTT/sub/x", "$MQTT/msgs/x", "$MQTT/rmsgs", "_INBOX/x"),
)
"""Topics that are not one's own to publish to."""


@asynccontextmanager
async def everything(port: int, directory: Path) -> AsyncIterator[aiomqtt.Client]:
    """Somebody with the manager's credentials, who hears what anybody says to nodes, jobs and cluster."""
    tls = ssl.create_default_context(cafile=directory / "ca.crt")
    its = pki.pair(directory, pki.MANAGER)
    tls.load_cert_chain(its.certificate, its.key)
    async with aiomqtt.Client("127.0.0.1", port, identifier="witness", tls_context=tls, timeout=5) as client:
        for topic in ("#", "$JS/API/#", "$KV/#", "$MQTT/#", "_INBOX/#"):
            await subscribed(client, topic)
        await heard(client)  # what is retained
        yield client


class Attack:
    """One's credentials, and who looks on."""

    def __init__(self, port: int, nats_port: int, directory: Path, two: Subject, witness: aiomqtt.Client) -> None:
        self.port, self.nats_port, self.directory = port, nats_port, directory
        self._two, self._witness = two, witness
        self._since = two.member.status()["since"]

    def client(self, identifier: str = ONE, **options: Any) -> aiomqtt.Client:
        """A connection with the certificate of node one."""
        tls = context(self.directory, ONE)
        return aiomqtt.Client("127.0.0.1", self.port, identifier=identifier, tls_context=tls, timeout=5, **options)

    async def changed_nothing(self, what: str) -> None:
        """Nobody heard of it, and two has had its connection all the time."""
        evil = [it for it in await heard(self._witness) if it[1] == EVIL]
        assert evil == [], what
        status = self._two.member.status()
        assert status["connected"], what
        assert status["since"] >= self._since, what
        self._since = status["since"]


async def reads(attack: Attack) -> None:
    """Every filter that would show more than what is one's own."""
    async with attack.client() as one:
        for topic in READS:
            with suppress(aiomqtt.MqttError):  # no filter at all to the broker
                assert not await subscribed(one, topic), topic
        assert await subscribed(one, f"nodes/{ONE}/net/subnetwork/result")
        assert await subscribed(one, "cluster/exposed/+"), "every node needs it"


async def writes(attack: Attack) -> None:
    """Every topic of somebody else, retained or not."""
    for topic in WRITES:
        for qos in (0, 1):
            with suppress(aiomqtt.MqttError):  # the broker may end the connection
                async with attack.client() as one:
                    await one.publish(topic, EVIL, qos=qos, retain=qos > 0, timeout=0.05)
    await attack.changed_nothing("publish")


async def last_wills(attack: Attack) -> None:
    """A will that the broker would publish for us."""
    for topic in WRITES:
        with suppress(aiomqtt.MqttError):
            async with attack.client(will=aiomqtt.Will(topic, EVIL, 1, True)) as one:
                connection: Any = one._client.socket()
                connection.shutdown(socket.SHUT_RDWR)
    await attack.changed_nothing("last will")


async def identifiers(attack: Attack) -> None:
    """The place of another node's connection, or of what it left."""
    for clean in (True, False):
        async with attack.client(TWO, clean_session=clean) as thief:
            assert await heard(thief) == []
    await attack.changed_nothing("identifier")


async def users(attack: Attack) -> None:
    """Another name than the certificate's."""
    for user in (pki.MANAGER, f"CN={pki.MANAGER}", f"CN={TWO}", TWO):
        for password in (None, "", "x"):
            with suppress(aiomqtt.MqttError):
                async with attack.client(username=user, password=password) as one:
                    assert not await subscribed(one, f"{ANOTHERS}/subnetwork/result"), user
                    assert not await subscribed(one, "#"), user


async def other_doors(attack: Attack) -> None:
    """The manager's side of the broker, which is on the loopback: a node that runs on the same machine."""

    async def refused(**options: Any) -> bool:
        async def ignore(_: Exception) -> None:
            """The library would print it."""

        address = f"nats://127.0.0.1:{attack.nats_port}"
        try:
            client = await nats.connect(
                address, allow_reconnect=False, max_reconnect_attempts=0, error_cb=ignore, **options
            )
        except (nats.errors.Error, OSError):
            return True
        await client.close()
        return False

    assert await refused()
    for user in (pki.MANAGER, f"CN={pki.MANAGER}", f"CN={ONE}", f"CN={TWO}"):
        for password in ("", "x"):
            assert await refused(user=user, password=password), user
    assert await refused(tls=context(attack.directory, ONE))


@pytest.mark.parametrize("attempt", [reads, writes, last_wills, identifiers, users, other_doors])
def test_one_nodes_credentials_do_nothing_to_another(
    secured: tuple[Cluster, Path], tmp_path: Path, attempt: Callable[[Attack], Awaitable[None]]
) -> None:
    cluster, directory = secured
    its = pki.pair(directory / pki.NODES, TWO)
    files = {"ca": directory / "ca.crt", "certificate": its.certificate, "key": its.key}

    async def test() -> None:
        async with (
            started(config(tmp_path / "state", cluster.mqtt, TWO, **files)) as two,
            everything(cluster.mqtt, directory) as witness,
        ):
            await two.connected()
            await attempt(Attack(cluster.mqtt, cluster.nats, directory, two, witness))

    run(test)


def test_the_witness_would_hear_it(secured: tuple[Cluster, Path]) -> None:
    """Or the tests above would prove nothing: one says something in its own name, and in its will."""
    cluster, directory = secured
    own = f"nodes/{ONE}/net/status"

    async def test() -> None:
        async with everything(cluster.mqtt, directory) as witness:
            async with connected(cluster.mqtt, directory, ONE) as one:
                await one.publish(own, EVIL, qos=1)
            assert (own, EVIL) in await heard(witness)

    asyncio.run(test())


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cluster with certificates and a manager."""
    from tests.manager.processes import cluster

    directory = tmp_path_factory.mktemp("secured")
    with cluster(directory) as own:
        init(directory / "pki", ONE, TWO)
        own.manager("--pki", str(directory / "pki"))
        yield own, directory / "pki"
