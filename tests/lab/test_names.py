"""Services called by name from a lab's containers, with the tools that people use."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cluster.manager.descriptor import Descriptor
from appliance.lab import lifecycle, network
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import CLOSEST_V4, CLOSEST_V6, WEB_SERVICE, WEB_V4, WEB_V6, Container, Spec, dns_name
from appliance.naming import resolv
from tests.conftest import ROOT
from tests.lab.conftest import BROKEN
from tests.lab.helpers import FAMILIES, NOTHING, environment, instance_ip, leftovers, run, until

pytestmark = pytest.mark.root

WEB = "web.lab.demo.lab.local"
LONG = "long.lab.demo.lab.local"
LONG_STRINGS = 20
SOON_S = 1.0
"""Within which an answer follows a change of the cluster."""

AVAHI = """
mkdir -p /run/dbus
dbus-daemon --config-file=/usr/share/dbus-1/system.conf --address=unix:path={directory}/bus --nofork --nopidfile &
export DBUS_SYSTEM_BUS_ADDRESS=unix:path={directory}/bus
for _ in $(seq 50); do test -S {directory}/bus && break; sleep 0.1; done
mkdir -p /run/avahi-daemon && mount -t tmpfs tmpfs /run/avahi-daemon
avahi-daemon -f {directory}/avahi.conf --no-drop-root --no-chroot --no-rlimits &
sleep 1.5
avahi-resolve -4 -n {name}
avahi-resolve -6 -n {name}
avahi-resolve -a {address}
avahi-browse -trp _http._tcp
kill %2 %1
wait
"""
ZEROCONF = """
import queue, sys
from zeroconf import IPVersion, ServiceBrowser, Zeroconf
found = queue.Queue()
class Listener:
    def add_service(self, zc, kind, name):
        found.put(zc.get_service_info(kind, name, 3000))
    def remove_service(self, zc, kind, name): pass
    def update_service(self, zc, kind, name): pass
zc = Zeroconf(interfaces=[sys.argv[1]], ip_version=IPVersion.V4Only)
browser = ServiceBrowser(zc, "_http._tcp.local.", Listener())
info = found.get(timeout=10)
print(info and (info.server, info.port, sorted(info.parsed_addresses(IPVersion.V4Only)), info.properties))
zc.close()
"""


def dig(lab: Lab, *arguments: str) -> str:
    """What dig prints in node 1's client, by the client's own resolv.conf."""
    return run(lab, "client1", "dig", "+tries=1", "+time=3", *arguments)


def short(lab: Lab, *arguments: str) -> list[str]:
    return dig(lab, "+short", *arguments).splitlines()


def curl(lab: Lab, url: str, *options: str) -> str:
    """Which container answers a call."""
    done = run(lab, "client1", "curl", "-sf", "--max-time", "10", *options, url)
    return str(json.loads(done)["container"])


def instance_ips(lab: Lab, container: Container) -> set[str]:
    return {instance_ip(lab, container, family) for family in FAMILIES}


@pytest.fixture
def long(lab: Lab) -> Iterator[None]:
    """A service whose metadata fits no datagram."""
    parts = {"app": "demo", "namespace": "lab", "service": "long", "service_namespace": "lab"}
    metadata = {f"key{number}": "x" * 200 for number in range(LONG_STRINGS)}
    lab.manager.deploy([Descriptor.model_validate({**parts, "metadata": metadata})])
    yield
    lab.manager.undeploy("demo.lab.long.lab")


def test_the_demos_name_is_its_jobs() -> None:
    assert dns_name(WEB_SERVICE) == WEB


@pytest.mark.parametrize("family", ["-4", "-6"])
@pytest.mark.parametrize("name", ["web", WEB, f"rr.{WEB}"])
def test_curl_by_name_is_balanced(lab: Lab, name: str, family: str) -> None:
    assert {curl(lab, f"http://{name}/", family) for _ in range(8)} == {"web0", "web1"}


@pytest.mark.parametrize("name", ["closest.web", f"closest.{WEB}"])
def test_curl_of_closest_stays_on_the_node(lab: Lab, name: str) -> None:
    assert {curl(lab, f"http://{name}/") for _ in range(4)} == {"web0"}


def test_curl_of_an_instance(lab: Lab) -> None:
    assert [curl(lab, f"http://{number}.{WEB}/") for number in (0, 1)] == ["web0", "web1"]


def test_every_type_of_record(lab: Lab) -> None:
    assert short(lab, WEB, "A") == [str(WEB_V4)]
    assert short(lab, WEB, "AAAA") == [str(WEB_V6)]
    assert short(lab, f"closest.{WEB}", "A", f"closest.{WEB}", "AAAA") == [str(CLOSEST_V4), str(CLOSEST_V6)]
    assert short(lab, f"1.{WEB}", "A") == [instance_ip(lab, lab.plan.web[1], "v4")]
    assert short(lab, f"_http._tcp.{WEB}", "SRV") == [f"0 0 80 {WEB}."]
    assert short(lab, WEB, "TXT") == ['"about=demo of the lab"']
    for address in (WEB_V4, WEB_V6):
        assert short(lab, "-x", str(address)) == [f"{WEB}."]
    assert short(lab, "+search", "web") == [str(WEB_V4)]


def test_what_there_is_not(lab: Lab) -> None:
    nodata, nxdomain = dig(lab, WEB, "MX"), dig(lab, f"none.{WEB.partition('.')[2]}")
    assert "status: NOERROR" in nodata
    assert "ANSWER: 0, AUTHORITY: 1" in nodata
    assert "status: NXDOMAIN" in nxdomain
    assert "SOA" in nxdomain


def test_over_tcp_with_edns_and_without(lab: Lab) -> None:
    assert short(lab, "+tcp", WEB) == [str(WEB_V4)]
    assert "EDNS: version: 0" in dig(lab, "+edns=0", WEB)
    assert "EDNS" not in dig(lab, "+noedns", WEB).partition("QUESTION")[0]
    assert "status: BADVERS" in dig(lab, "+edns=1", "+noednsneg", WEB)


@pytest.mark.usefixtures("long")
def test_an_answer_that_is_too_long_is_truncated_and_asked_again_over_tcp(lab: Lab) -> None:
    for edns in ("+edns=0", "+noedns"):
        cut = dig(lab, "+ignore", edns, LONG, "TXT")
        assert "tc" in cut.partition(";; flags:")[2].partition(";")[0].split()
        assert "ANSWER: 0" in cut
        whole = dig(lab, edns, LONG, "TXT")
        assert "Truncated, retrying in TCP mode" in whole
        assert "(TCP)" in whole
        assert all(f'"key{number}=' in whole for number in range(LONG_STRINGS))


def test_musl_as_a_stub_resolver(lab: Lab, tmp_path: Path) -> None:
    if shutil.which("musl-gcc") is None:
        pytest.skip("needs musl-gcc (musl-tools)")
    built = tmp_path / "look_up"
    source = ROOT / "tests" / "lab" / "programs" / "look_up.c"
    subprocess.run(["musl-gcc", "-static", "-o", built, source], check=True, timeout=60)
    for name in ("web", WEB, "rr.web"):
        assert set(run(lab, "client1", str(built), name).split()) == {str(WEB_V4), str(WEB_V6)}
    assert run(lab, "client1", str(built), f"1.{WEB}").split()[0] in instance_ips(lab, lab.plan.web[1])
    with pytest.raises(AssertionError, match="does not resolve"):
        run(lab, "client1", str(built), f"none.{WEB.partition('.')[2]}")


def test_avahi_and_zeroconf_find_the_service(lab: Lab, tmp_path: Path) -> None:
    tmp_path.joinpath("avahi.conf").write_text(
        "[server]\nuse-ipv6=yes\nenable-dbus=yes\nallow-interfaces=eth0\n[wide-area]\nenable-wide-area=no\n"
    )
    script = AVAHI.format(directory=tmp_path, name=WEB, address=WEB_V6)
    inside = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script]
    command = lab.command("client1", inside)
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, env=environment(lab))
    assert f"{WEB}\t{WEB_V4}" in done.stdout, done.stdout + done.stderr
    assert f"{WEB}\t{WEB_V6}" in done.stdout, "AAAA"
    assert f"{WEB_V6}\t{WEB}" in done.stdout, "PTR"
    assert f"=;eth0;IPv4;web\\.lab\\.demo\\.lab;Web Site;local;{WEB};{WEB_V4};80;" in done.stdout
    own = lab.manager.picture().placed(lab.plan.client()).address_v4
    found = run(lab, "client1", sys.executable, "-c", ZEROCONF, str(own))
    assert found.startswith(f"('{WEB}.', 80, ['{WEB_V4}'")


def test_a_node_says_where_a_name_leads(lab: Lab) -> None:
    socket = str(lab.files.socket("node1"))
    said = run(lab, "node1", sys.executable, "-m", "appliance", "resolve", "--socket", socket, f"closest.{WEB}")
    assert f"service {CLOSEST_V4} policy closest" in said
    assert f"  next {WEB_SERVICE}.0: each worker takes turns among the nearest" in said
    said = run(lab, "node1", sys.executable, "-m", "appliance", "resolve", "--socket", socket, WEB)
    assert said.count(": up, weight 1, 50% of new flows") == 2 * len(lab.plan.web), "both families"
    assert "  next any of these: each worker takes its turns" in said


@pytest.fixture
def single() -> Iterator[Lab]:
    """A node of its own, for tests that change the cluster or leave it behind; its upstream server does not exist."""
    try:
        yield lifecycle.up(Spec(BROKEN, nodes=1, instances=1, workers=(1,)))
    finally:
        lifecycle.down(BROKEN)
    assert leftovers(BROKEN) == NOTHING


def test_answers_follow_the_cluster_and_outlive_it_and_nothing_of_them_is_left(single: Lab) -> None:
    lab = single
    assert short(lab, f"1.{WEB}") == []
    lifecycle.scale(BROKEN, "web", 2)
    until(lambda: len(short(lab, f"1.{WEB}")) == 1, "the new instance has a name", SOON_S)
    lifecycle.scale(BROKEN, "web", 1)
    until(lambda: short(lab, f"1.{WEB}") == [], "the name of an instance that has gone", SOON_S)
    lifecycle.kill(BROKEN, "cluster")
    assert "status: SERVFAIL" in dig(lab, "example.com"), "no server upstream can be reached"
    answered = dig(lab, WEB)
    assert f"{WEB}." in answered
    assert str(WEB_V4) in answered
    assert curl(lab, "http://web/") == "web0"
    files = [resolv.DIRECTORY / it.namespace / resolv.FILE for it in lab.plan.containers]
    assert all(it.is_file() for it in files)
    lifecycle.kill(BROKEN, "node1")
    lifecycle.down(BROKEN)
    assert not any(it.parent.exists() for it in files)


def test_the_resolv_conf_of_others_is_left_alone() -> None:
    directory = resolv.DIRECTORY / f"{BROKEN}-client7"
    directory.mkdir(parents=True)
    try:
        (directory / resolv.FILE).write_text("nameserver 192.0.2.1\n")
        assert network.existing(BROKEN) == []
        network.remove([directory.name])
        assert (directory / resolv.FILE).exists()
    finally:
        (directory / resolv.FILE).unlink()
        directory.rmdir()
    directory.mkdir()
    assert network.existing(BROKEN) == [directory.name], "what is left of a supervisor that was killed while writing"
    network.remove([directory.name])
    assert not directory.exists()
