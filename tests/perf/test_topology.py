"""That a measurement's network is what it says it is, and is removed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyroute2 import netns

from appliance.lab.processes import inside
from perf import net, topology
from perf.load import iperf, ports
from perf.load.tool import ROOT
from perf.systems import OTHERS
from perf.systems.direct import Direct
from perf.systems.vip import VxlanVip
from perf.systems.vxlan import Vxlan
from perf.topology import PLAN, Subnet

pytestmark = pytest.mark.root


def ours() -> list[str]:
    return [name for name in netns.listnetns() if name.startswith(net.PREFIX)]


@pytest.fixture
def nodes():
    with net.workspace():
        topology.build([], lambda _: None, appliance=False)
        yield
    assert ours() == []


@pytest.mark.parametrize("system", [Direct(), Vxlan(), *OTHERS], ids=lambda it: it.name)
def test_the_client_reaches_the_server(nodes, system):
    if missing := system.missing():
        pytest.skip(f"{system.name}: expected the Debian packages {', '.join(missing)}")
    path = system.set_up()
    with system.active(), iperf.server(path.server):
        for address in filter(None, (path.address_v4, path.address_v6)):
            net.run(*inside(path.client, ["iperf3", "-c", address, "-p", str(ports.IPERF), "-n", "1M"]))
    assert path.address_v6 or system.name == "nebula"


def test_vxlan_is_really_on_the_underlay(nodes):
    path = Vxlan().set_up()
    before = topology.underlay_traffic()
    net.run(*inside(path.client, ["ping", "-c", "3", "-i", "0.1", "-s", "1000", path.address_v4]))
    outer = 14 + 20 + 8 + 8 + 14 + 20 + 8 + 1000
    assert (topology.underlay_traffic() - before).octets >= 3 * outer


def test_offloads_are_as_before_afterwards(nodes):
    node = PLAN.nodes[0].namespace
    with topology.cutting_underlay():
        cut = net.run(*inside(node, ["ethtool", "-k", "uplink"]))
    after = net.run(*inside(node, ["ethtool", "-k", "uplink"]))
    for line in ("tx-tcp-segmentation: {}", "tx-udp-segmentation: {}", "generic-segmentation-offload: {}"):
        assert line.format("off") in cut
        assert line.format("on") in after
    assert "generic-receive-offload: on" in cut
    assert "generic-receive-offload: off" in after


def test_subnets_of_systems_and_nodes_differ():
    assert Subnet(91, 1).prefixes == ("10.91.1.0/24", "2001:db8:91:1::/64")
    assert Subnet(92, 2).host(1) == ("10.92.2.1/24", "2001:db8:92:2::1/64")


def test_two_measurements_do_not_share_a_machine(nodes):
    with pytest.raises(net.NetError, match="no other measurement"), net.workspace():
        pytest.fail("entered twice")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number):
    argv = [sys.executable, "-m", "perf", "run", "--systems", "direct", "--scenarios", "tcp1", "--seconds", "30"]
    run = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not _streaming() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _streaming()
        run.send_signal(number)
        assert run.wait(20) != 0
    finally:
        run.kill()
        run.communicate()
    assert ours() == []


def test_the_next_run_removes_what_a_killed_one_left():
    net.add_namespace(net.PREFIX + "direct1")
    sleeper = subprocess.Popen(inside(net.PREFIX + "direct1", ["sleep", "60"]))
    time.sleep(0.2)
    with net.workspace():
        assert ours() == []
    assert sleeper.wait(5) == -signal.SIGTERM


def _streaming() -> bool:
    """Whether a client of ours sends."""
    return any(b"-J" in _command(pid) for pid in netns.ns_pids().get(net.PREFIX + "direct2", []))


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_the_others_are_not_tracked_while_one_system_needs_it(nodes):
    """What nftables tracks costs each packet; no system shall pay for another's rules."""
    direct, vip = Direct(), VxlanVip()
    plain, translated = direct.set_up(), vip.set_up()
    node, streams = PLAN.nodes[1].namespace, 6

    def tracked(path: topology.Path) -> int:
        """Connections that the client's node tracks more, after so many streams and iperf3's own connection."""
        count = inside(node, ["cat", "/proc/sys/net/netfilter/nf_conntrack_count"])
        before = int(net.run(*count))
        with iperf.server(path.server):
            iperf.stream(path.client, path.address_v4, 1, streams)
        return int(net.run(*count)) - before

    with vip.active():
        assert tracked(plain) < streams, "beside neighbour discovery and the like, nothing"
        assert tracked(translated) > streams
