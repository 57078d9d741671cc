"""Members with our own cluster service manager and its broker, as real processes."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.member import Subject, config, run, started
from tests.cluster.test_member import short_life
from tests.manager.processes import Cluster, Manager, cluster

JOB = "app.ns.web.test"
OTHER_NODE, OTHER_ADDRESS = "65f0000000000000000000b2", "192.0.2.2"
RR = "10.30.30.30"


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[tuple[Cluster, Manager]]:
    """A running cluster that wants two instances of a service."""
    with cluster(tmp_path) as it:
        manager = it.manager()
        manager.deploy(JOB, 2, service_ips={"rr": {"v4": RR}})
        yield it, manager


@asynccontextmanager
async def two(tmp_path: Path, port: int, **settings: Any) -> AsyncIterator[tuple[Subject, Subject]]:
    """Two members."""
    first = config(tmp_path / "first", port, **settings)
    second = config(tmp_path / "second", port, node=OTHER_NODE, **settings)
    async with started(first) as one, started(second, OTHER_ADDRESS) as other:
        yield one, other


async def deploy(subject: Subject, number: int) -> None:
    """An instance on a node, in its own subnet."""
    subnetwork = await subject.member.subnetwork()
    assert subnetwork.v4 is not None
    assert subnetwork.v6 is not None
    v4, v6 = IPv4Address(subnetwork.v4[2]), IPv6Address(subnetwork.v6[2])
    await subject.member.deployed(JOB, number, v4, v6)


def test_two_nodes_find_each_other_and_lose_each_other(whole: tuple[Cluster, Manager], tmp_path: Path) -> None:
    running, manager = whole

    async def test() -> None:
        async with two(tmp_path, running.mqtt) as (one, other):
            first, second = await one.member.subnetwork(), await other.member.subnetwork()
            assert first != second
            await deploy(one, 0)
            await other.until(lambda: manager.service(JOB)["instances"][0]["status"] == "up")
            assert await other.member.resolve(ip_address(RR))
            assert other.tables == {JOB: [0]}
            await deploy(other, 1)
            await one.until(lambda: one.tables == {JOB: [0, 1]})
            await one.member.undeployed(JOB, 0)
            await other.until(lambda: other.tables == {JOB: [1]})
            assert one.tables == {JOB: [1]}

    run(test)


def test_a_node_that_dies_takes_its_instances_along_at_once(whole: tuple[Cluster, Manager], tmp_path: Path) -> None:
    running, _ = whole

    async def test() -> None:
        settings = config(tmp_path / "second", running.mqtt, node=OTHER_NODE)
        process = short_life(settings.model_dump_json(include={"node", "cluster", "paths"}), deploy=JOB)
        try:
            async with started(config(tmp_path / "first", running.mqtt)) as one:
                await deploy(one, 0)
                await one.until(lambda: one.tables == {JOB: [0, 1]})
                os.kill(process.pid, signal.SIGKILL)
                died = time.monotonic()
                await one.until(lambda: one.tables == {JOB: [0]})
                assert time.monotonic() - died < 5
        finally:
            process.kill()
            process.wait()

    run(test)


def test_each_node_knows_the_others(whole: tuple[Cluster, Manager], tmp_path: Path) -> None:
    running, _ = whole

    async def test() -> None:
        async with two(tmp_path, running.mqtt) as (one, other):
            await one.until(lambda: list(one.nodes) == [OTHER_NODE])
            await other.until(lambda: len(other.nodes) == 1 and OTHER_NODE not in other.nodes)
            await other.member.address_changed(ip_address("192.0.2.77"), 50103)
            await one.until(lambda: one.nodes == {OTHER_NODE: "192.0.2.77"})
            await other.member.stop()
            await one.until(lambda: one.nodes == {})

    run(test)


def test_a_broker_that_dies_costs_nothing_known(whole: tuple[Cluster, Manager], tmp_path: Path) -> None:
    running, _ = whole

    async def test() -> None:
        async with two(tmp_path, running.mqtt, interest=60) as (one, other):
            await deploy(one, 0)
            await deploy(other, 1)
            await one.until(lambda: one.tables == other.tables == {JOB: [0, 1]})
            running.kill_server()
            await one.connected(connected=False)
            await other.member.undeployed(JOB, 1)
            await one.until(lambda: one.tables == {JOB: [0]})
            assert {frozenset({JOB})} == set(one.changes), "the job never left the tables"
            assert await one.member.subnetwork() != await other.member.subnetwork()

    run(test)


def test_a_node_has_its_subnets_for_good(whole: tuple[Cluster, Manager], tmp_path: Path) -> None:
    running, _ = whole

    async def test() -> None:
        async with started(config(tmp_path / "first", running.mqtt)) as one:
            before = await one.member.subnetwork()
        async with started(config(tmp_path / "first", running.mqtt)) as again:
            assert await again.member.subnetwork() == before
        async with started(config(tmp_path / "its state was lost", running.mqtt)) as afresh:
            assert await afresh.member.subnetwork() == before

    run(test)


def test_an_answer_is_not_held_back(whole: tuple[Cluster, Manager], tmp_path: Path) -> None:
    """A first call to a service costs a question and its answer, not a timer of somebody's TCP."""
    running, _ = whole

    async def test() -> None:
        async with two(tmp_path, running.mqtt) as (one, other):
            await deploy(one, 0)
            await other.connected()
            times = []
            for number in range(9):
                began = time.monotonic()
                await other.member.resolve(ip_address(f"10.30.99.{number}"))
                times.append(time.monotonic() - began)
                await asyncio.sleep(0.05)
            assert sorted(times)[4] < 0.035, f"median of {times}"

    run(test)
