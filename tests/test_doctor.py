"""Findings of `appliance doctor`, each from what a machine or a node may look like."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from appliance import doctor, trial
from appliance.config import Cluster, Config, Paths
from appliance.trial import TRIALS
from tests.environment.netns import namespaces

WELL: dict[str, Any] = {
    "ill": [],
    "not_ready": [],
    "workers": [{}, {}],
    "offloads": {"tun_uso": {"wanted": True, "on": True, "reason": ""}},
    "peers": {"nodes": 2, "unknown_path_mtu": 0, "smallest_path_mtu": 1500},
    "cluster": {"member": True, "connected": True, "broker": "mqtt://b:1", "since": 5.0, "last_error": ""},
    "tables": {"hosts": 1, "capacity": {"hosts": 10}},
    "node": {"last_error": ""},
}


@pytest.mark.parametrize(
    ("release", "state"), [("5.15.0-generic", "wrong"), ("6.1.0-18-amd64", "warning"), ("6.18.0", "ok"), ("10.0", "ok")]
)
def test_kernel(release: str, state: str) -> None:
    assert doctor.kernel(release).state == state


def test_capabilities_are_those_of_the_process() -> None:
    assert doctor.capabilities("CapEff:\t000001ffffffffff\n").state == "ok"
    few = doctor.capabilities("CapEff:\t0000000000001000\n")
    assert (few.state, "CAP_NET_ADMIN" in few.found, "CAP_BPF" in few.found) == ("wrong", False, True)


def test_a_missing_device_and_a_silent_broker(tmp_path: Path) -> None:
    assert doctor.tun_device(tmp_path / "tun").state == "wrong"
    (found,) = doctor.broker(Config(cluster=Cluster(url="127.0.0.1", port=1)))
    assert (found.state, found.check) == ("wrong", "broker")
    assert list(doctor.broker(Config())) == []
    kept = Config(paths=Paths(state=tmp_path / "a" / "b", cache=tmp_path))
    assert [it.check for it in doctor.directories(kept)] == ["paths.state", "paths.cache"]


@pytest.mark.parametrize(
    ("change", "check", "state"),
    [
        ({"ill": ["worker 0 does not run"]}, "node", "wrong"),
        ({"offloads": {"udp_gso": {"wanted": True, "on": False, "reason": "EIO"}}}, "udp_gso", "warning"),
        ({"peers": WELL["peers"] | {"unknown_path_mtu": 1}}, "path MTU", "wrong"),
        ({"peers": WELL["peers"] | {"smallest_path_mtu": 1400}}, "path MTU", "warning"),
        ({"cluster": WELL["cluster"] | {"connected": False}}, "cluster", "wrong"),
        ({"tables": {"staleness": 900.0, "capacity": {}}}, "tables", "warning"),
        ({"tables": {"hosts": 10, "capacity": {"hosts": 10}}}, "tables.hosts", "warning"),
        ({"node": {"last_error": "reload: x"}}, "last error", "warning"),
    ],
)
def test_what_is_not_well_has_a_way_to_mend_it(change: dict[str, Any], check: str, state: str) -> None:
    assert {it.state for it in doctor.of_node(WELL, 1450)} == {"ok"}
    (found,) = [it for it in doctor.of_node(WELL | change, 1450) if it.check == check]
    assert found.state == state
    assert found.mend.endswith(".")


def test_without_an_appliance_that_is_a_finding() -> None:
    last = doctor.examine(Config(), None, "no socket")[-1]
    assert (last.check, last.state, last.found) == ("appliance", "unknown", "no socket")


@pytest.mark.root
def test_this_kernel_can_do_all_that_is_tried_and_nothing_is_left() -> None:
    found, why = doctor.trial()
    assert (found, why) == (dict.fromkeys(TRIALS, ""), "")
    assert {it.state for it in doctor.tried(found, why)} == {"ok"}
    assert not list(Path("/sys/class/net").glob("trial*"))


@pytest.mark.parametrize("name", TRIALS)
def test_what_the_kernel_lacks_has_a_way_to_mend_it(name: str) -> None:
    finding = {it.check: it for it in doctor.tried(dict.fromkeys(TRIALS, "") | {name: "Unknown kind"}, "")}[name]
    assert (finding.state, finding.found, finding.mend.endswith(".")) == ("wrong", "Unknown kind", True)


@pytest.mark.root
def test_each_is_really_tried() -> None:
    """Where something is in the way of all but the filter, which finds a link to be at, and the sockets."""
    with namespaces() as make:
        place = make()
        for link in (trial._VETH, trial._BRIDGE, trial._TUN):
            place.ip("link", "add", link, "type", "veth")
        place.command("tc", "qdisc", "add", "dev", trial._VETH, "clsact")
        ask = "import json; from appliance.trial import all_tried; print(json.dumps(all_tried()))"
        said = json.loads(place.command(sys.executable, "-c", ask))
    assert {name for name, reason in said.items() if reason} == {"bridge", "veth", "sch_ingress", "multi_queue_tun"}


def test_without_permission_it_is_not_known() -> None:
    (finding,) = doctor.tried({}, "Operation not permitted")
    assert (finding.state, finding.found) == ("unknown", "Operation not permitted")
