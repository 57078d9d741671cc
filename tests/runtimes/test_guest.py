"""Unikernels and virtual machines: what their namespace has; with --long a real guest in each layout."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from appliance.client import ApiError
from appliance.environment import guest as layout
from appliance.environment.attachment import Attachment, NetnsRef
from tests.environment.netns import Netns
from tests.runtimes import guest
from tests.supervisor.pair import Pair
from tests.supervisor.world import Node, ready, until

JOB, RR, RR6 = "app.ns.vm.test", "10.30.70.1", "fdff:2000::7001"
THREE = "65f0000000000000000000c3"
BOOT_S = 120.0


def test_rules_lead_both_families_to_the_guest_and_back():
    made = Attachment(
        JOB, 0, "eth0", IPv4Address("10.18.0.2"), None, IPv4Address("10.18.0.1"), None, NetnsRef.by_name("x")
    )  # fmt: skip
    text = layout.rules(made)
    assert 'oifname "eth0" snat ip to 10.18.0.2' in text
    assert 'iifname "eth0" ip daddr 10.18.0.2 dnat ip to 192.168.1.2' in text
    assert "ip6" not in text


@pytest.fixture
def image(busybox: Path, tmp_path: Path, long: bool) -> tuple[Path, Path]:
    """Kernel and initial file system."""
    if not long:
        pytest.skip("a guest in software emulation: only with --long")
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86")
    try:
        found = guest.unpacked(tmp_path)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        pytest.skip(f"needs a kernel image to download with apt-get: {error}")
    (kernel,) = found.glob("boot/vmlinuz-*")
    return kernel, guest.initrd(found, busybox, tmp_path)


@pytest.fixture
def service(pair: Pair) -> Iterator[str]:
    """A service whose instance is to be a guest; its namespace is gone afterwards."""
    pair.manager.deploy(JOB, 1, service_ips={"rr": {"v4": RR, "v6": RR6}})
    name = layout.namespace_name(JOB, 0)
    yield name
    for node in (pair.one, *pair.world.nodes[2:]):
        if any(it["service"] == JOB for it in node.api.attachments()):
            node.api.detach_guest(JOB, 0)
    assert not Path("/run/netns", name).exists()


def into(node: Node) -> list[str]:
    """The beginning of a command in the guest's namespace, which is mounted where the node's supervisor lives."""
    assert node.popen is not None
    return ["nsenter", "-t", str(node.popen.pid), "-m", "ip", "netns", "exec", layout.namespace_name(JOB, 0)]


def inside(node: Node, *command: str) -> str:
    """What a command prints in the guest's namespace."""
    return subprocess.run([*into(node), *command], capture_output=True, text=True, check=True).stdout


def answers(client: Netns, url: str) -> bool:
    """Whether the guest's web server answers a client on the other node."""
    command = ["ip", "netns", "exec", client.name, "curl", "-s", "--max-time", "3", url]
    return subprocess.run(command, capture_output=True, text=True).stdout == "it is the guest\n"


@pytest.mark.root
def test_the_namespace_of_a_guest(pair: Pair, service: str) -> None:
    for _ in range(2):  # a repeated deployment changes nothing
        made = pair.one.api.attach_guest(JOB, 0)
        assert made["netns"] == f"name:{service}"
        links = inside(pair.one, "ip", "-o", "link")
        assert "tap0: <NO-CARRIER,BROADCAST,MULTICAST,UP> mtu 1500" in links.replace("mtu 1450", "mtu 1500")
        assert "master virbr0" in links
        assert made["guest"]["mac"] in links
        assert "192.168.1.1/30" in inside(pair.one, "ip", "-o", "addr", "show", "virbr0")
        assert "fd42:ea::1/126" in inside(pair.one, "ip", "-o", "addr", "show", "virbr0")
        assert f"default via {made['gateway_v4']}" in inside(pair.one, "ip", "route")
    until(lambda: pair.is_up(JOB), "the cluster has the instance")
    pair.one.api.detach_guest(JOB, 0)
    assert not Path("/run/netns", service).exists()
    until(lambda: not pair.is_up(JOB), "the cluster has it no more")


@pytest.mark.root
def test_a_container_is_no_guest(pair: Pair) -> None:
    with pair.service() as container:
        with pytest.raises(ApiError, match=f"{container.job} 0 is not attached as a guest"):
            pair.one.api.detach_guest(container.job, 0)
        assert container.job in {it["service"] for it in pair.one.api.attachments()}


@pytest.mark.root
def test_what_is_refused_when_an_attachment_is_repeated_costs_it_nothing(pair: Pair) -> None:
    with pair.service() as container:
        pair.one.api.attach(container.job, 0, {"netns": container.container.name}, "8080:80")
        until(lambda: pair.is_up(container.job), "it is announced")
        before = pair.one.api.attachments()
        with pytest.raises(ApiError, match="interface: expected eth0"):
            pair.one.api.attach(
                container.job, 0, {"netns": container.container.name, "interface": "other0"}, "8080:80;8081:81"
            )
        assert pair.one.api.attachments() == before, "what was refused changes nothing"
        assert pair.one.api.status()["firewall"]["ports"] == 1
        far = "/run/netns/" + "./" * 120 + container.container.name  # more than the link's record can hold
        with pytest.raises(ApiError, match="netns: expected at most"):
            pair.one.api.attach(container.job, 0, {"path": far}, "8080:80")
        assert pair.one.api.attachments() == before
        assert pair.is_up(container.job)


@pytest.mark.root
def test_a_guest_answers_through_its_service_ip(
    pair: Pair, service: str, image: tuple[Path, Path], tmp_path: Path
) -> None:
    made = pair.one.api.attach_guest(JOB, 0)
    told = {"v4": "192.168.1.2/30", "gw4": "192.168.1.1", "v6": "fd42:ea::2/126", "gw6": "fd42:ea::1"}
    device = "ifname=tap0,script=no,downscript=no"
    log = tmp_path / "console"
    with guest.running(into(pair.one), *image, told, device, "02:00:00:00:00:02", log):
        until(lambda: b"ready" in log.read_bytes(), "the guest runs", BOOT_S)
        until(lambda: answers(pair.client, f"http://{RR}/"), "it answers")
        until(lambda: answers(pair.client, f"http://[{RR6}]/"), "it answers over IPv6")
    assert made["address_v6"]


@pytest.mark.root
def test_a_guest_with_the_instances_own_addresses(
    pair: Pair, service: str, image: tuple[Path, Path], tmp_path: Path
) -> None:
    node = pair.world.member(THREE, network={"guest": "macvtap"}).start()
    ready(node)
    made = node.api.attach_guest(JOB, 0)
    (v4, v6), (own4, own6) = (made["address_v4"], made["address_v6"]), made["prefixes"].values()
    told = {"v4": f"{v4}/{own4}", "gw4": made["gateway_v4"], "v6": f"{v6}/{own6}", "gw6": made["gateway_v6"]}
    inside(node, "ip", "addr", "del", f"{v4}/{own4}", "dev", made["interface"])  # as a NodeEngine does
    log = tmp_path / "console"
    descriptor = guest.open_macvtap(into(node), tmp_path)
    try:
        with guest.running(into(node), *image, told, f"fd={descriptor}", made["guest"]["mac"], log):
            until(lambda: b"ready" in log.read_bytes(), "the guest runs", BOOT_S)
            until(lambda: answers(pair.client, f"http://{RR}/"), "it answers")
            until(lambda: answers(pair.client, f"http://[{RR6}]/"), "it answers over IPv6")
    finally:
        os.close(descriptor)
