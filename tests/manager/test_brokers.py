"""Three brokers that are one cluster, each with a manager: a minority may go, and takes no node with it that lives."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.cluster.manager import pki
from appliance.cluster.manager.broker import BrokerError, configuration
from appliance.cluster.manager.presence import Rounds, Verdict
from appliance.cluster.manager.settings import Settings
from tests.manager.node import Node, connect
from tests.manager.processes import Cluster, Manager, free_port
from tests.manager.test_pki import context

STAYS, GOES, TURNS = "65f0000000000000000000a1", "65f0000000000000000000b2", "65f0000000000000000000c3"
JOB = "app.ns.web.test"
WAIT_S = 40.0

# --- What a round says --------------------------------------------------------------------------


def test_a_node_that_is_nowhere_in_two_rounds_is_lost() -> None:
    rounds = Rounds()
    assert rounds.judge([], {STAYS: True}) == Verdict()
    assert rounds.judge([], {STAYS: True}) == Verdict(lost=(STAYS,))
    assert rounds.judge([], {STAYS: False}) == Verdict()


def test_a_node_that_is_back_in_the_second_round_is_not_lost() -> None:
    rounds = Rounds()
    for connected in ([], [STAYS], [], [STAYS]):
        assert rounds.judge(connected, {STAYS: True}) == Verdict()


def test_a_node_that_is_connected_and_counts_as_lost_has_to_come_back() -> None:
    rounds = Rounds()
    assert rounds.judge([STAYS], {STAYS: False}) == Verdict()
    assert rounds.judge([STAYS], {STAYS: False}) == Verdict(back=(STAYS,))


def test_nodes_that_never_said_whether_they_are_there_are_left_alone() -> None:
    rounds = Rounds()
    for connected in ([], [], [STAYS], [STAYS]):
        assert rounds.judge(connected, {STAYS: None}) == Verdict()


# --- What the broker is told --------------------------------------------------------------------


def test_others_join_with_a_certificate_and_the_password(tmp_path: Path) -> None:
    pki.init(tmp_path, ["broker.example"], [STAYS])
    settings = Settings(pki=tmp_path, route=(("a.example", 6222), ("2001:db8::1", 6222)), broker_name="a", replicas=3)
    told = configuration(settings.broker_settings)
    password = pki.load(tmp_path).password
    assert told["server_name"] == "a"
    assert told["cluster"]["authorization"] == {"user": "route", "password": password}
    assert told["cluster"]["tls"]["verify"] is True
    assert told["cluster"]["routes"][1] == f"tls://route:{password}@[2001:db8::1]:6222"
    assert told["mqtt"]["stream_replicas"] == 3


def test_without_certificates_no_other_broker_is_let_in(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="--route: expected --pki"):
        configuration(Settings(route=(("a.example", 6222),)).broker_settings)


def test_a_certificate_is_made_anew_for_another_host_if_that_is_wanted(tmp_path: Path) -> None:
    pki.init(tmp_path, ["one.example", "192.0.2.1"], [STAYS])
    assert pki.init(tmp_path, ["192.0.2.1", "one.example"], [], renew=True) == []
    assert [it.name for it in pki.init(tmp_path, ["two.example"], [], renew=True)] == ["server.key", "server.crt"]
    pki.load(tmp_path)


# --- For real -----------------------------------------------------------------------------------


@dataclass
class Three:
    """Three brokers with managers, and how each is started."""

    pki: Path
    clusters: list[Cluster]
    routes: list[int]
    managers: list[Manager]

    def start(self, number: int) -> Manager:
        """One of them, ready: with most of the others."""
        routes = [word for port in self.routes for word in ("--route", f"127.0.0.1:{port}")]
        listen = f"127.0.0.1:{self.routes[number]}"
        name = f"broker{number}"
        options = ["--pki", str(self.pki), "--replicas", "3", "--roll-call", "3", "--broker-name", name]
        return self.clusters[number].manager(*options, *routes, "--route-listen", listen)

    def mqtt(self, number: int) -> int:
        """The port for nodes."""
        return self.clusters[number].mqtt


@pytest.fixture
def three(tmp_path: Path, long: bool) -> Iterator[Three]:
    """All three, ready."""
    if not long:
        pytest.skip("takes half a minute (--long)")
    pki.init(tmp_path / "pki", ["127.0.0.1"], [STAYS, GOES, TURNS])
    with ExitStack() as stack:
        clusters = [Cluster(tmp_path / str(number), stack) for number in range(3)]
        for it in clusters:
            it.directory.mkdir()
        made = Three(tmp_path / "pki", clusters, [free_port() for _ in clusters], [])
        with ThreadPoolExecutor() as pool:
            made.managers = list(pool.map(made.start, range(3)))
        yield made


def test_a_broker_dies_with_a_node_and_comes_back(three: Three) -> None:
    three.managers[0].deploy(JOB, 3)
    assert _joins(three.routes[0], three.pki) == "-ERR 'Authorization Violation'"
    asyncio.run(_life(three))


async def _life(three: Three) -> None:
    def up(number: int = 0) -> list[int]:
        instances = three.managers[number].service(JOB)["instances"]
        return [it["number"] for it in instances if it["status"] == "up"]

    async with _node(three, 0, STAYS) as stays, _node(three, 1, TURNS) as turns:
        async with _node(three, 2, GOES) as goes:
            for number, node in enumerate((stays, turns, goes)):
                await node.deployed(JOB, number, f"10.18.0.{number + 2}", f"fc00::{number + 2}")
            await _until(lambda: all(up(number) == [0, 1, 2] for number in range(3)))
            three.managers[2].process.stop(signal.SIGKILL)
            await goes.cut_off()
        await _until(lambda: up() == [0, 1] == up(1))  # its will went with its broker
        await stays.until(JOB, 2)
        three.managers[1].deploy("app.ns.other.test")
        three.managers[2] = await asyncio.to_thread(three.start, 2)
        async with _node(three, 2, GOES) as goes:
            await goes.deployed(JOB, 2, "10.18.0.4", "fc00::4")
            await _until(lambda: up(2) == [0, 1, 2])
        await turns.say("status", {"status": "offline"}, retain=True)
        await asyncio.wait_for(turns.cut_off(), WAIT_S)  # it is connected, and counts as lost


def _node(three: Three, broker: int, name: str) -> AbstractAsyncContextManager[Node]:
    return connect(three.mqtt(broker), name, will=True, tls=context(three.pki, name))


async def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not await asyncio.to_thread(true):
        assert time.monotonic() < end
        await asyncio.sleep(0.2)


def _joins(port: int, directory: Path) -> str:
    """What a broker says to one who would join it with a node's certificate."""
    node = context(directory, STAYS)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        node.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        secured.sendall(b"CONNECT " + json.dumps({"name": "x", "cluster": "edge"}).encode() + b"\r\n")
        return secured.makefile().read().splitlines()[-1]
