"""The commands of a person on a lab that is up."""

import json
import signal
import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from appliance.lab.lifecycle import Lab
from appliance.lab.plan import WEB_SERVICE
from tests.conftest import ROOT
from tests.lab.helpers import balanced, namespace_ip, until

pytestmark = pytest.mark.root


def line(lab: Lab, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "appliance", "lab", "--name", lab.plan.spec.name, *arguments]


def lab_command(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line(lab, *arguments), capture_output=True, text=True, timeout=30, cwd=ROOT)


@pytest.mark.parametrize("url", ["http://10.30.30.30/", "http://[fdff:2000::30]/"])
def test_exec_curl(lab: Lab, url: str) -> None:
    done = lab_command(lab, "exec", "client1", "--", "curl", "-sf", url)
    assert done.returncode == 0
    assert json.loads(done.stdout)["container"] in ("web0", "web1")


def test_exec_ping(lab: Lab) -> None:
    for address in (balanced("v4"), balanced("v6")):
        assert lab_command(lab, "exec", "client2", "ping", "-nqc1", "-W2", address).returncode == 0


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_exec_has_the_commands_exit_status(lab: Lab, status: int) -> None:
    assert lab_command(lab, "exec", "web0", "--", "sh", "-c", f"exit {status}").returncode == status


def test_exec_hands_arguments_and_streams_through(lab: Lab) -> None:
    command = line(lab, "exec", "web0", "--", "sh", "-c", 'cat; echo "$@" >&2', "sh", "--json", "a b", "--", "-x")
    done = subprocess.run(command, input="in", capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("in", "--json a b -- -x\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_to_exec_is_the_commands(lab: Lab, number: signal.Signals) -> None:
    """`exec` is replaced by the command: same process, so no signal can be lost."""
    with subprocess.Popen(line(lab, "exec", "web0", "--", "sleep", "1000"), cwd=ROOT) as child:
        until(lambda: "sleep" in Path(f"/proc/{child.pid}/comm").read_text(), "it sleeps")
        child.send_signal(number)
        assert child.wait(5) == -number


def test_exec_of_what_does_not_exist(lab: Lab) -> None:
    done = lab_command(lab, "exec", "web0", "--", "no-such-command")
    assert (done.returncode, done.stderr) == (127, "appliance lab: no-such-command: command not found\n")
    done = lab_command(lab, "exec", "web7", "--", "true")
    assert done.returncode == 1
    members = "cluster, node1, node2, web0, web1, client1, client2"
    assert done.stderr.startswith(f"appliance lab: web7: expected one of {members}")


def test_exec_sees_only_the_containers_links(lab: Lab) -> None:
    assert set(lab_command(lab, "exec", "web0", "--", "ls", "/sys/class/net").stdout.split()) == {
        "lo",
        "eth0",
    }


def test_the_nodes_own_commands_work_in_a_node(lab: Lab) -> None:
    done = lab_command(lab, "exec", "node2", "--", sys.executable, "-m", "appliance", "status", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["workers"]) == 2


def test_status_says_all_that_a_program_needs(lab: Lab) -> None:
    data = json.loads(lab_command(lab, "status", "--json").stdout)
    assert data["cluster"]["running"]
    assert data["cluster"]["error"] is None
    assert [(it["name"], it["running"], it["status"], it["tunnel"]) for it in data["nodes"]] == [
        ("node1", True, "online", "198.18.0.1"),
        ("node2", True, "online", "198.18.0.2"),
    ]
    web1 = next(it for it in data["containers"] if it["name"] == "web1")
    subnets = {it["name"]: (it["subnet_v4"], it["subnet_v6"]) for it in data["nodes"]}
    assert ip_address(web1.pop("address_v4")) in ip_network(subnets["node2"][0])
    assert ip_address(web1.pop("address_v6")) in ip_network(subnets["node2"][1])
    assert web1 == {
        "name": "web1",
        "node": "node2",
        "namespace": f"{lab.plan.spec.name}-web1",
        "service": WEB_SERVICE,
        "instance": 1,
        "instance_v4": "10.30.0.1",
        "instance_v6": "fdff::1",
        "status": "up",
    }
    web = next(it for it in data["services"] if it["name"] == WEB_SERVICE)
    assert web["dns"] == "web.lab.demo.lab.local"
    assert web["service_ips"] == {
        "rr": {"v4": "10.30.30.30", "v6": "fdff:2000::30"},
        "closest": {"v4": "10.30.30.31", "v6": "fdff:1000::30"},
    }
    assert web["instances"][1] == {
        "instance": 1,
        "container": "web1",
        "node": "node2",
        "status": "up",
        "service_ips": {"instance": {"v4": "10.30.0.1", "v6": "fdff::1"}},
    }


def test_status_for_a_person_shows_every_node_and_container(lab: Lab) -> None:
    shown = lab_command(lab, "status").stdout
    for member in lab.plan.members:
        assert member.namespace in shown
    assert namespace_ip(lab, lab.plan.web[1], "v6") in shown
    assert balanced("v4") in shown
    assert "web.lab.demo.lab.local" in shown
