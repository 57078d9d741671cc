"""A cluster with certificates: each node says and hears what is its own, and nobody else gets in."""

import asyncio
import json
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from appliance.cluster import topics
from appliance.cluster.manager import pki
from appliance.cluster.manager.topics import to_filter
from tests.manager.processes import ROOT, Cluster

ONE, TWO, LATER = "65f0000000000000000000a1", "65f0000000000000000000b2", "65f0000000000000000000c3"
JOB = "app.ns.web.test"
REFUSED = 0x80
PAUSE_S = 0.5
"""Within which a message that may be heard is heard."""


def init(directory: Path, *nodes: str) -> list[str]:
    command = [sys.executable, "-m", "appliance", "cluster", "init", str(directory), "--host", "127.0.0.1", "--json"]
    command += [word for node in nodes for word in ("--node", node)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return [Path(it).name for it in json.loads(done.stdout)["made"]]


def context(directory: Path, name: str | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=directory / "ca.crt")
    if name is not None:
        it = pki.pair(directory / pki.NODES, name)
        made.load_cert_chain(it.certificate, it.key)
    return made


@asynccontextmanager
async def connected(port: int, directory: Path, name: str | None) -> AsyncIterator[aiomqtt.Client]:
    async with aiomqtt.Client(
        "127.0.0.1", port, identifier=name or "x", tls_context=context(directory, name), timeout=5
    ) as client:
        yield client


async def subscribed(client: aiomqtt.Client, topic: str) -> bool:
    """Whether the broker lets a client hear a topic."""
    codes: Any = await client.subscribe(topic, qos=1)
    return int(getattr(codes[0], "value", codes[0])) < REFUSED


async def heard(client: aiomqtt.Client) -> list[tuple[str, bytes]]:
    """What arrives from now on, until nothing does."""
    found = []
    try:
        while True:
            message = await asyncio.wait_for(anext(client.messages), PAUSE_S)
            found.append((str(message.topic), bytes(message.payload)))
    except TimeoutError:
        return found


def test_each_node_has_its_own_topics_only(own: Cluster, tmp_path: Path) -> None:
    directory = tmp_path / "pki"
    assert "server.crt" in init(directory, ONE, TWO)
    manager = own.manager("--pki", str(directory))
    asyncio.run(_each_its_own(own.mqtt, directory))
    asyncio.run(_nobody_else(own.mqtt, directory))
    assert init(directory, LATER) == [f"{LATER}.key", f"{LATER}.crt"]
    manager.process.popen.send_signal(signal.SIGHUP)
    asyncio.run(_let_in(own.mqtt, directory, LATER))


async def _each_its_own(port: int, directory: Path) -> None:
    async with connected(port, directory, ONE) as one, connected(port, directory, TWO) as two:
        for client, name in ((one, ONE), (two, TWO)):
            for kind in ("subnetwork/result", "tablequery/result"):
                assert await subscribed(client, f"nodes/{name}/net/{kind}")
            assert await subscribed(client, f"jobs/{JOB}/updates_available")
            assert await subscribed(client, "cluster/nodes/+")
            assert await subscribed(client, "cluster/exposed/+")
        for topic in (
            f"nodes/{TWO}/net/subnetwork/result",
            f"nodes/{TWO}/net/#",
            "nodes/+/net/status",
            "#",
            "jobs/#",
            "$MQTT/sub/#",
        ):
            assert not await subscribed(one, topic), topic
        await one.publish(f"nodes/{ONE}/net/subnet", b'{"METHOD": "GET"}', qos=1)
        assert [topic for topic, _ in await heard(one)] == [f"nodes/{ONE}/net/subnetwork/result"]
    for topic in (
        f"nodes/{TWO}/net/subnetwork/result",
        f"nodes/{TWO}/net/subnet",
        f"jobs/{JOB}/updates_available",
        f"cluster/nodes/{TWO}",
        f"nodes/{ONE}/net/subnetwork/result",
    ):
        async with connected(port, directory, TWO) as two:
            await subscribed(two, f"nodes/{TWO}/net/subnetwork/result")
            await subscribed(two, f"jobs/{JOB}/updates_available")
            await subscribed(two, "cluster/nodes/+")
            await heard(two)  # what is retained
            await _say(port, directory, topic)
            assert await heard(two) == [], topic


async def _say(port: int, directory: Path, topic: str) -> None:
    """Node one publishes, and may lose its connection for it."""
    try:
        async with connected(port, directory, ONE) as one:
            await one.publish(topic, b'{"METHOD": "GET"}', qos=1, retain=True, timeout=1)
    except aiomqtt.MqttError:
        return


async def _nobody_else(port: int, directory: Path) -> None:
    init(directory.parent / "others", ONE)
    others = context(directory.parent / "others", ONE)
    others.load_verify_locations(directory / "ca.crt")
    for tls in (None, context(directory, None), others):
        with pytest.raises((aiomqtt.MqttError, ssl.SSLError)):
            async with aiomqtt.Client("127.0.0.1", port, identifier=ONE, tls_context=tls, timeout=2) as client:
                await client.subscribe("cluster/nodes/+", timeout=2)


async def _let_in(port: int, directory: Path, name: str) -> None:
    for _ in range(50):
        try:
            async with connected(port, directory, name) as client:
                assert await subscribed(client, f"nodes/{name}/net/subnetwork/result")
                return
        except aiomqtt.MqttError:
            await asyncio.sleep(0.1)
    raise AssertionError("a node that was added is not let in")


@pytest.mark.parametrize(
    ("what", "expected"),
    {
        "key that others may read": "server.key: expected mode 0600, got 0644",
        "certificate of others": "expected a certificate of this cluster's authority",
        "key of another": "server.key: expected the key of server.crt",
        "no password": "manager.password: expected a readable file",
        "another name": f"expected CN={TWO}, got CN={ONE}",
        "no directory": "ca.crt: expected a certificate in PEM",
    }.items(),
)
def test_what_is_not_secure_does_not_start(tmp_path: Path, what: str, expected: str) -> None:
    directory, others = tmp_path / "pki", tmp_path / "others"
    pki.init(directory, ["broker.example"], [ONE])
    pki.init(others, ["broker.example"], [ONE])
    if what == "key that others may read":
        (directory / "server.key").chmod(0o644)
    elif what == "certificate of others":
        (directory / "server.crt").write_bytes((others / "server.crt").read_bytes())
    elif what == "key of another":
        (directory / "server.key").write_bytes((others / "server.key").read_bytes())
    elif what == "no password":
        (directory / "manager.password").unlink()
    elif what == "another name":
        (directory / "nodes" / f"{ONE}.crt").rename(directory / "nodes" / f"{TWO}.crt")
    else:
        directory = tmp_path / "nothing"
    with pytest.raises(pki.PkiError, match=expected):
        pki.load(directory)
    command = [sys.executable, "-m", "appliance", "cluster", "run", "--pki", str(directory)]
    command += ["--state", str(tmp_path / "state"), "--runtime", str(tmp_path / "run")]
    if what == "no password":
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 1
        assert expected in done.stderr


def test_a_node_may_say_and_hear_what_its_session_does_and_no_more() -> None:
    kinds = (topics.SUBNET, topics.QUERY, topics.INTEREST_REMOVE, topics.DEPLOYED, topics.UNDEPLOYED)
    says = {topics.of_node(ONE, kind) for kind in (*kinds, topics.ADDRESS_CHANGED, topics.STATUS, topics.HEALTH)}
    results = {topics.of_node(ONE, kind) for kind in (topics.SUBNETWORK_RESULT, topics.QUERY_RESULT)}
    hears = {*results, topics.ALL_NODES, topics.ALL_EXPOSED, topics.updates("+")}
    allowed = pki.permissions(ONE)
    assert set(allowed["publish"]["allow"]) == set(map(to_filter, says))
    assert set(allowed["subscribe"]["allow"]) == {*map(to_filter, hears), "$MQTT.sub.>"}


def test_what_is_there_stays(tmp_path: Path) -> None:
    pki.init(tmp_path, ["broker.example"], [ONE])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert [it.name for it in pki.init(tmp_path, ["other.example"], [ONE, TWO])] == [f"{TWO}.key", f"{TWO}.crt"]
    assert {path: path.read_bytes() for path in before} == before
    assert pki.load(tmp_path).nodes == (ONE, TWO)
    assert pki.load(tmp_path).password not in repr(pki.load(tmp_path))
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.key")} == {0o600}
