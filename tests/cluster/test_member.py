"""A member over a real broker, with a manager that does what existing ones do."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from pathlib import Path

import aiomqtt
import pytest

from tests.cluster import wire
from tests.cluster.existing import manager
from tests.cluster.member import config, run, started
from tests.cluster.mosquitto import Mosquitto, mosquitto, needs_mosquitto
from tests.cluster.wire import JOB, OTHER, RR, instance
from tests.conftest import ROOT

pytestmark = needs_mosquitto
V4, V6 = IPv4Address("10.18.0.2"), IPv6Address("fc00::2")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path) as running:
        yield running


def test_it_connects_as_existing_nodes_do(broker: Mosquitto, tmp_path: Path) -> None:
    async def test() -> None:
        async with started(config(tmp_path / "state", broker.port)) as subject:
            await subject.connected()

    run(test)
    assert f"as {wire.NODE} (p2, c1, k3)" in broker.log.read_text(), "MQTT 3.1.1, clean session, keepalive 3 s"


def test_a_life(broker: Mosquitto, tmp_path: Path) -> None:
    """Registration, deployment, a first call, scaling, the end."""

    async def test() -> None:
        async with manager(broker.port) as cluster, started(config(tmp_path / "state", broker.port)) as subject:
            member = subject.member
            assert (await member.subnetwork()).v4 == IPv4Network("10.18.0.64/26")
            own = instance(node=wire.ADDRESS, namespace_ip=str(V4), namespace_ip_v6=str(V6))
            cluster.jobs = {JOB: [own], OTHER: [instance(5, rr="10.30.30.31")]}
            await member.deployed(JOB, 0, V4, V6)
            await subject.until(lambda: subject.tables == {JOB: [0]})
            assert await member.resolve(ip_address("10.30.30.31"))
            assert subject.tables == {JOB: [0], OTHER: [5]}, "published before whoever waits goes on"
            assert not await member.resolve(ip_address("10.30.99.99"))
            cluster.jobs[OTHER].append(instance(6, rr="10.30.30.31"))
            await cluster.notify(OTHER)
            await subject.until(lambda: subject.tables[OTHER] == [5, 6])
            await member.undeployed(JOB, 0)
            await cluster.until(lambda: bool(cluster.said("service/undeployed")))
        assert [it["status"] for it in cluster.said("status")] == ["online", "offline"]
        assert len(cluster.said("service/deployed")) == 1

    run(test)


def test_callers_share_one_question(broker: Mosquitto, tmp_path: Path) -> None:
    async def test() -> None:
        async with manager(broker.port) as cluster, started(config(tmp_path / "state", broker.port)) as subject:
            cluster.jobs = {JOB: [instance()]}
            await subject.connected()
            found = await asyncio.gather(*(subject.member.resolve(ip_address(RR)) for _ in range(50)))
            assert found == [True] * 50
            assert [it["sip"] for it in cluster.said("tablequery/request") if it["sip"]] == [RR]

    run(test)


def test_a_caller_that_gives_up_does_not_take_the_others_along(broker: Mosquitto, tmp_path: Path) -> None:
    async def test() -> None:
        async with manager(broker.port) as cluster, started(config(tmp_path / "state", broker.port)) as subject:
            cluster.jobs = {JOB: [instance()]}
            impatient = asyncio.create_task(subject.member.resolve(ip_address(RR)))
            patient = asyncio.create_task(subject.member.resolve(ip_address(RR)))
            await asyncio.sleep(0)
            impatient.cancel()
            assert await patient

    run(test)


def test_an_unused_interest_ends_and_the_manager_goes_on(broker: Mosquitto, tmp_path: Path) -> None:
    async def test() -> None:
        settings = config(tmp_path / "state", broker.port, interest=1)
        async with manager(broker.port) as cluster, started(settings) as subject:
            cluster.jobs = {JOB: [instance()]}
            assert await subject.member.need(JOB)
            await cluster.until(lambda: cluster.said("interest/remove") == [{"appname": JOB}])
            await subject.until(lambda: subject.tables == {})
            assert await subject.member.need(JOB)

    run(test)


def test_the_broker_dies_and_returns(broker: Mosquitto, tmp_path: Path) -> None:
    """Nothing known is lost; what changed meanwhile is in force soon after."""

    async def test() -> None:
        async with started(config(tmp_path / "state", broker.port, interest=60)) as subject:
            async with manager(broker.port) as cluster:
                cluster.jobs = {JOB: [instance()], OTHER: [instance(5)]}
                await subject.member.deployed(JOB, 0, V4, V6)
                assert await subject.member.need(OTHER)
            broker.kill()
            await subject.connected(connected=False)
            before = dict(subject.tables)
            assert before == {JOB: [0], OTHER: [5]}
            await subject.member.undeployed(JOB, 0)
            await subject.member.deployed(JOB, 1, V4, V6)
            assert await subject.member.resolve(ip_address("10.30.0.6")), "known services go on"
            broker.start()
            async with manager(broker.port) as cluster:
                cluster.jobs = {JOB: [instance(1)], OTHER: [instance(5), instance(6)]}
                returned = time.monotonic()
                await subject.until(lambda: subject.tables.get(OTHER) == [5, 6])
                assert time.monotonic() - returned < 5
                await cluster.until(lambda: bool(cluster.said("service/undeployed")))
                await cluster.until(lambda: bool(cluster.said("service/deployed")))
                assert [it["instance_number"] for it in cluster.said("service/deployed")] == [1]
            status = subject.member.status()
            assert status["counters"]["connections"] == 2

    run(test)


def test_what_the_broker_sends_is_never_fatal(broker: Mosquitto, tmp_path: Path) -> None:
    async def test() -> None:
        async with manager(broker.port) as cluster, started(config(tmp_path / "state", broker.port)) as subject:
            cluster.jobs = {JOB: [instance()]}
            assert await subject.member.need(JOB)
            wrong = (b"", b"\xff\xfe", b"null", b'{"app_name":5}', wire.answer(instance(host_port="x")))
            for payload in wrong:
                await cluster.say(wire.NODE, "tablequery/result", payload)
                await cluster.say(wire.NODE, "subnetwork/result", payload)
            await subject.until(lambda: subject.member.status()["counters"]["refused"] == 2 * len(wrong))
            assert "nodes/" in subject.member.status()["last_error"]
            cluster.jobs[JOB].append(instance(1))
            await cluster.notify(JOB)
            await subject.until(lambda: subject.tables == {JOB: [0, 1]})

    run(test)


def test_a_supervisor_that_refuses_tables_is_asked_again(broker: Mosquitto, tmp_path: Path) -> None:
    async def test() -> None:
        async with manager(broker.port) as cluster, started(config(tmp_path / "state", broker.port)) as subject:
            cluster.jobs = {JOB: [instance()], OTHER: [instance(5)]}
            subject.tables = None  # type: ignore[assignment]

            def full(_: object) -> None:
                raise RuntimeError("tables.hosts: expected room")

            publish, subject.member._feed._publish = subject.member._feed._publish, full
            assert await subject.member.need(JOB)
            assert subject.member.status()["counters"]["tables_refused"] == 1
            subject.member._feed._publish = publish
            assert await subject.member.need(OTHER)
            assert subject.tables == {JOB: [0], OTHER: [5]}
            assert {JOB, OTHER} in subject.changes

    run(test)


def test_many_services_are_known_again_after_a_restart(broker: Mosquitto, tmp_path: Path) -> None:
    async def test() -> None:
        jobs = [f"app.ns.s{number}.test" for number in range(300)]
        async with manager(broker.port) as cluster:
            settings = config(tmp_path / "state", broker.port, interest=600, query_timeout=15)
            async with started(settings) as subject:
                cluster.jobs = {job: [instance()] for job in jobs}
                assert all(await asyncio.gather(*map(subject.member.need, jobs)))
            for job in jobs:
                cluster.jobs[job].append(instance(1))
            async with started(settings) as again:
                assert again.tables == {job: [0] for job in jobs}, "as the last process knew them"
                await again.until(lambda: again.tables == {job: [0, 1] for job in jobs})

    run(test)


# --- The end of a node --------------------------------------------------------------------------

SHORT_LIFE = """
import asyncio, json, sys, uvloop
from ipaddress import ip_address
from appliance.cluster.member import Member
from appliance.config import Config

async def main():
    config = Config.model_validate(json.loads(sys.argv[1]), strict=False)
    member = Member(config, ip_address("192.0.2.2"), 50103, lambda tables: None)
    await member.start()
    member.serve()
    if sys.argv[2]:
        subnetwork = await member.subnetwork()
        await member.deployed(sys.argv[2], 1, subnetwork.v4[2], subnetwork.v6[2])
    await asyncio.Event().wait()

uvloop.run(main())
"""


def short_life(settings: str, deploy: str = "") -> subprocess.Popen[bytes]:
    """A node in a process of its own, with instance 1 of a job, or nothing; without a farewell."""
    return subprocess.Popen([sys.executable, "-c", SHORT_LIFE, settings, deploy], cwd=ROOT)


async def status_of(port: int) -> str:
    """What the broker has retained of the node's status."""
    async with aiomqtt.Client("127.0.0.1", port) as client:
        await client.subscribe(wire.topic("status"), qos=1)
        async for message in client.messages:
            assert isinstance(message.payload, bytes)
            assert message.retain
            return str(json.loads(message.payload)["status"])
    raise AssertionError


def test_a_node_that_is_killed_is_said_to_be_gone(broker: Mosquitto, tmp_path: Path) -> None:
    async def test() -> None:
        async with manager(broker.port) as cluster:
            settings = config(tmp_path / "state", broker.port).model_dump_json(include={"node", "cluster", "paths"})
            process = short_life(settings)
            try:
                await cluster.until(lambda: [it["status"] for it in cluster.said("status")] == ["online"])
                assert await status_of(broker.port) == "online"
                os.kill(process.pid, signal.SIGKILL)
                killed = time.monotonic()
                await cluster.until(lambda: len(cluster.said("status")) == 2)
                assert time.monotonic() - killed < 1
            finally:
                process.kill()
                process.wait()
        assert cluster.said("status")[1] == {"status": "offline"}
        assert await status_of(broker.port) == "offline"

    run(test)


def test_a_node_that_stops_says_so_itself(broker: Mosquitto, tmp_path: Path) -> None:
    async def test() -> None:
        async with started(config(tmp_path / "state", broker.port)) as subject:
            await subject.connected()
        assert await status_of(broker.port) == "offline"

    run(test)


def test_a_stop_does_not_wait_for_a_cluster_that_is_away(tmp_path: Path) -> None:
    async def test() -> None:
        with mosquitto(tmp_path) as broker:
            port = broker.port
        async with started(config(tmp_path / "state", port)) as subject:
            waiting = asyncio.create_task(subject.member.resolve(ip_address(RR)))
            await subject.until(lambda: bool(subject.member.status()["last_error"]))
            began = time.monotonic()
        assert time.monotonic() - began < 1
        assert await waiting is False

    run(test)


# --- What is kept -------------------------------------------------------------------------------


def test_a_node_serves_what_it_knew_without_a_cluster(tmp_path: Path) -> None:
    async def test() -> None:
        with mosquitto(tmp_path) as broker:
            settings = config(tmp_path / "state", broker.port)
            async with manager(broker.port) as cluster, started(settings) as subject:
                cluster.jobs = {JOB: [instance()]}
                assert await subject.member.need(JOB)
                subnetwork = await subject.member.subnetwork()
        async with started(settings) as again:
            assert again.tables == {JOB: [0]}
            assert await again.member.subnetwork() == subnetwork
            assert await again.member.resolve(ip_address(RR))
            assert again.member.status()["staleness"] > 0
            assert again.member.status()["connected"] is False

    run(test)


def test_a_place_that_keeps_nothing_stops_nobody(broker: Mosquitto, tmp_path: Path) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("not a directory")

    async def test() -> None:
        async with manager(broker.port) as cluster, started(config(blocked, broker.port)) as subject:
            cluster.jobs = {JOB: [instance()]}
            assert await subject.member.need(JOB)
            await subject.member.subnetwork()
            await subject.until(lambda: subject.member.status()["counters"]["saves_failed"] == 2)
            assert subject.tables == {JOB: [0]}

    run(test)
