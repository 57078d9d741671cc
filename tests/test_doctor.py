"""Findings of `appliance doctor`, each from what a machine or a node may look like."""

from pathlib import Path
from typing import Any

import pytest

from appliance import doctor
from appliance.config import Cluster, Config, Paths

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
