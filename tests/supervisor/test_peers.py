"""Which nodes there are, and what the kernel knows of the paths to them."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import wraps
from ipaddress import ip_address
from typing import Any

import pytest

from appliance.cluster.messages import ClusterNode
from appliance.cluster.requests import Endpoint
from appliance.supervisor import peers
from appliance.supervisor.peers import Peers, PeerSet, path_mtus
from appliance.tables import layout
from appliance.tables.catalogue import Catalogue, Host, Node
from appliance.tables.layout import IPAddress
from appliance.tables.publish import Publisher
from tests.environment import netns

HERE = Endpoint(ip_address("192.0.2.1"), 50103)
A, B = ip_address("192.0.2.2"), ip_address("192.0.2.3")


def host(number: int, node: IPAddress, port: int = 50103) -> Host:
    """A container on a node."""
    return Host(ip_address("10.18.0.0") + number, node, port)


# --- Which nodes there are ----------------------------------------------------------------------


def test_a_node_is_there_as_long_as_one_of_its_hosts() -> None:
    known = PeerSet(HERE)
    known.host(None, host(1, A))
    known.host(None, host(2, A))
    assert known.take() == {A: Node(A, 50103)}
    known.host(host(1, A), None)
    assert known.take() == {}
    known.host(host(2, A), host(2, B))
    assert known.take() == {A: None, B: Node(B, 50103)}


def test_the_clusters_nodes_need_no_hosts_and_are_ours() -> None:
    known = PeerSet(HERE)
    known.node("a", Endpoint(A, 50103))
    assert known.take() == {A: Node(A, 50103, ours=True)}
    known.node("a", Endpoint(A, 50103))
    known.host(None, host(1, A))
    assert known.take().get(A, Node(A, 50103, ours=True)) == Node(A, 50103, ours=True)
    known.node("a", None)
    assert known.take() == {A: Node(A, 50103)}


def test_a_node_that_moves_leaves_its_address() -> None:
    known = PeerSet(HERE)
    known.node("a", Endpoint(A, 50103))
    known.take()
    known.node("a", Endpoint(B, 50104))
    assert known.take() == {A: None, B: Node(B, 50104, ours=True)}


@pytest.mark.parametrize("ports", [(50103, 50104), (50104, 50103)])
def test_of_several_ports_the_lowest_counts_in_any_order(ports: tuple[int, int]) -> None:
    known = PeerSet(HERE)
    for number, port in enumerate(ports):
        known.host(None, host(number, A, port))
    assert known.take() == {A: Node(A, 50103)}
    known.host(host(ports.index(50103), A, 50103), None)
    assert known.take() == {A: Node(A, 50104)}


def test_this_node_is_none_of_its_peers_but_a_neighbour_behind_its_address_is() -> None:
    known = PeerSet(HERE)
    known.host(None, host(1, HERE.address))
    assert known.take() == {HERE.address: None}
    known.host(None, host(2, HERE.address, 50104))
    assert known.take() == {HERE.address: Node(HERE.address, 50104)}
    known.move(Endpoint(A, 50103))
    assert known.take()[HERE.address] == Node(HERE.address, 50103)


def test_a_paths_mtu_goes_with_its_node() -> None:
    known = PeerSet(HERE)
    known.host(None, host(1, A))
    known.take()
    known.measured({A: 1400, B: 1500})
    assert known.take() == {A: Node(A, 50103, mtu=1400)}
    known.measured({A: 1400})
    assert known.take() == {}
    known.host(host(1, A), None)
    known.host(None, host(1, A))
    assert known.take() == {A: Node(A, 50103)}


# --- Into the table -----------------------------------------------------------------------------


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Runs a test in an event loop of its own."""

    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


class Paths:
    """MTUs as a test has them, and what was asked for."""

    def __init__(self) -> None:
        self.mtu = 1500
        self.asked: list[list[IPAddress]] = []

    def __call__(self, addresses: Iterable[IPAddress]) -> dict[IPAddress, int]:
        asked = list(addresses)
        self.asked.append(asked)
        return dict.fromkeys(asked, self.mtu)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for something to become true."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@in_a_loop
async def test_table_answers_and_the_list_become_nodes_with_the_mtu_of_their_paths() -> None:
    publisher, paths = Publisher(layout.Capacity(64, 64, 64, nodes=64)), Paths()
    catalogue = Catalogue(publisher)
    known = Peers(catalogue, HERE, paths)
    catalogue.replace([host(1, A)], [])
    await known.start()
    assert catalogue.nodes == {A: Node(A, 50103, 1500)}
    listed = {"b": ClusterNode(host_ip=B, host_port=50103), "c": ClusterNode(host_ip=A, host_port=50103, overlay=1)}
    known.update(listed, listed)
    await until(lambda: catalogue.nodes.get(B) == Node(B, 50103, 1500, ours=True))
    assert catalogue.nodes[A] == Node(A, 50103, 1500, ours=False), "it says that it is none of ours"
    paths.mtu = 1400
    known.too_big(B)
    await until(lambda: catalogue.nodes[B].mtu == 1400)
    assert catalogue.nodes[A].mtu == 1500, "nobody asked for it"
    known.recheck()
    await until(lambda: catalogue.nodes[A].mtu == 1400)
    known.forget_cluster()
    await until(lambda: B not in catalogue.nodes)
    await known.stop()
    publisher.close()


@in_a_loop
async def test_a_flood_of_reports_costs_a_few_questions() -> None:
    publisher, paths = Publisher(layout.Capacity(64, 64, 64, nodes=64)), Paths()
    catalogue = Catalogue(publisher)
    known = Peers(catalogue, HERE, paths)
    catalogue.replace([host(1, A)], [])
    await known.start()
    began = time.monotonic()
    for _ in range(200):
        known.too_big(A)
        await asyncio.sleep(0.001)
    await known.stop()
    assert len(paths.asked) <= 3 + (time.monotonic() - began) / peers.PAUSE_S
    publisher.close()


@in_a_loop
async def test_a_full_table_is_counted_and_tried_again() -> None:
    publisher = Publisher(layout.Capacity(64, 64, 64, nodes=1))
    catalogue = Catalogue(publisher)
    known = Peers(catalogue, HERE, Paths())
    await known.start()
    listed = {"a": ClusterNode(host_ip=A, host_port=1), "b": ClusterNode(host_ip=B, host_port=1)}
    known.update(listed, ["a"])
    await until(lambda: A in catalogue.nodes)
    known.update(listed, ["b"])
    await until(lambda: known.failures > 0)
    assert list(catalogue.nodes) == [A]
    known.update({}, ["a"])
    await until(lambda: B in catalogue.nodes)
    await known.stop()
    publisher.close()


# --- The kernel's word --------------------------------------------------------------------------


@pytest.mark.root
def test_the_kernel_knows_link_route_and_absence() -> None:
    with netns.namespaces() as make:
        here = make()
        here.ip("link", "add", "narrow", "mtu", "1400", "type", "veth", "peer", "name", "nobody")
        for link in ("lo", "nobody", "narrow"):
            here.ip("link", "set", link, "up")
        here.ip("addr", "add", "198.51.100.1/24", "dev", "narrow")
        here.ip("addr", "add", "2001:db8:1::1/64", "dev", "narrow", "nodad")
        here.ip("route", "add", "203.0.113.0/24", "via", "198.51.100.2", "mtu", "1300")
        wanted = {"198.51.100.2": 1400, "203.0.113.9": 1300, "2001:db8:1::2": 1400, "192.0.2.9": 0, "2001:db8:9::1": 0}
        asked = {ip_address(text): mtu for text, mtu in wanted.items()}
        assert here.call(lambda: path_mtus(asked)) == asked
        here.ip("link", "set", "narrow", "mtu", "1350")
        assert here.call(lambda: path_mtus([ip_address("2001:db8:1::2")])) == {ip_address("2001:db8:1::2"): 1350}
