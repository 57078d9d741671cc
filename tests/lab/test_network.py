"""Namespaces and underlay, without any appliance in them."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute
from pyroute2.ethtool import Ethtool

from appliance.lab import network
from appliance.lab.plan import Spec, Topology, namespace_path, topology

pytestmark = pytest.mark.root

LAB = f"tn{os.getpid()}"


@pytest.fixture
def underlay(request: pytest.FixtureRequest) -> Iterator[Topology]:
    plan = topology(Spec(name=LAB, nodes=3, instances=1, **getattr(request, "param", {})))
    network.build(plan)
    yield plan
    network.remove(network.existing(LAB))


def ping(namespace: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", "netns", "exec", namespace, "ping", "-nqc1", "-W2", *arguments], capture_output=True)


def links() -> set[str]:
    with IPRoute() as ip:
        return {it.get("ifname") for it in ip.get_links()}


def test_every_node_reaches_every_other_over_both_families_with_full_packets(underlay: Topology) -> None:
    for node in underlay.nodes:
        for other in underlay.nodes:
            assert ping(node.namespace, "-Mdo", "-s1472", str(other.underlay_v4)).returncode == 0
            assert ping(node.namespace, "-Mdo", "-s1452", str(other.underlay_v6)).returncode == 0


def test_the_underlay_carries_no_more_than_1500_bytes(underlay: Topology) -> None:
    node, other = underlay.nodes[:2]
    assert ping(node.namespace, "-Mdo", "-s1473", str(other.underlay_v4)).returncode != 0


def test_nothing_is_created_in_the_machines_own_namespace() -> None:
    before = links()
    plan = topology(Spec(name=LAB, nodes=2, instances=1))
    network.build(plan)
    during = links()
    network.remove(network.existing(LAB))
    assert before == during == links()


def test_existing_and_remove_go_by_name(underlay: Topology) -> None:
    assert network.existing(LAB) == sorted(underlay.namespaces)
    network.remove([*network.existing(LAB), f"{LAB}-node99"])
    assert network.existing(LAB) == []
    assert not any(namespace_path(it).exists() for it in underlay.namespaces)


def test_a_half_made_namespace_is_removed_too() -> None:
    """`netns.create` may be killed between making the file and binding the namespace to it."""
    half = namespace_path(f"{LAB}-node7")
    half.parent.mkdir(exist_ok=True)
    half.touch()
    assert network.existing(LAB) == [half.name]
    network.remove([half.name])
    assert not half.exists()


def test_entered_comes_back_even_from_an_exception(underlay: Topology) -> None:
    home = Path("/proc/self/ns/net").stat().st_ino

    def fail() -> None:
        with network.entered(underlay.underlay):
            assert Path("/proc/thread-self/ns/net").stat().st_ino != home
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert Path("/proc/thread-self/ns/net").stat().st_ino == home


@pytest.mark.parametrize(("underlay", "cuts"), [({"cut": True}, True), ({"cut": False}, False)], indirect=["underlay"])
def test_a_cutting_underlay_segments_everywhere_and_joins_only_at_the_nodes(underlay: Topology, cuts: bool) -> None:
    ends = [(node.namespace, network.UPLINK) for node in underlay.nodes]
    ends += [(underlay.underlay, node.name) for node in underlay.nodes]
    for namespace, link in ends:
        with network.entered(namespace), Ethtool() as tool:
            features = tool.get_features(link).features
        assert [features[it].enable for it in network.SEGMENTATION] == [not cuts] * 3
        assert features["rx-gro"].enable == (cuts and link == network.UPLINK)
