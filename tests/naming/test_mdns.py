"""mDNS and DNS-SD on the bridge, with Avahi's tools and python-zeroconf in the container."""

import socket
import subprocess
import sys
import time

import dns.message
import pytest

from tests.naming.driver import JOB, NAME, Driver, resolver, service

pytestmark = pytest.mark.root

BROWSE = """
import sys, time
from zeroconf import IPVersion, ServiceBrowser, Zeroconf
class Listener:
    def add_service(self, zc, kind, name):
        info = zc.get_service_info(kind, name, 3000)
        print("added", name, info.server, info.port, sorted(info.parsed_addresses()), info.properties.get(b"version"),
              flush=True)
    def remove_service(self, zc, kind, name):
        print("removed", name, flush=True)
    def update_service(self, zc, kind, name): pass
zc = Zeroconf(interfaces=["10.18.0.2"], ip_version=IPVersion.V4Only)
browser = ServiceBrowser(zc, "_http._tcp.local.", Listener())
sys.stdin.readline()
zc.close()
"""


@pytest.fixture
def names(make_netns):
    """A resolver with mDNS; its names are announced."""
    with resolver(make_netns, [service()], (4, 6)) as driver:
        time.sleep(1.2)
        yield driver


def one_shot(names: Driver, name: str, kind: str = "A") -> list[str]:
    """What an ordinary resolver gets that asks on the multicast address, from a port of its own."""

    def ask() -> dns.message.Message:
        query = dns.message.make_query(name, kind)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(3)
            sock.sendto(query.to_wire(), ("224.0.0.251", 5353))
            reply = dns.message.from_wire(sock.recvfrom(9000)[0])
        assert query.is_response(reply)
        return reply

    return [rdata.to_text() for rrset in names.container.call(ask).answer for rdata in rrset]


def test_one_shot_questions(names):
    names.container.ip("route", "add", "224.0.0.0/4", "dev", "eth0")
    assert one_shot(names, NAME) == ["10.30.0.30"]
    assert one_shot(names, f"closest.{NAME}") == ["10.30.100.30"]
    assert one_shot(names, "_http._tcp.local", "PTR") == [r"web\.test\.shop\.prod._http._tcp.local."]


def test_zeroconf_browses_and_hears_the_goodbye(names):
    start = ["ip", "netns", "exec", names.container.name, sys.executable, "-c", BROWSE]
    with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as browser:
        assert browser.stdout is not None
        added = browser.stdout.readline()
        assert added.startswith(f"added web.test.shop.prod._http._tcp.local. {NAME}. 80 ['10.30.0.30'")
        assert "b'3'" in added
        names.say(put=[], gone=[JOB])
        assert browser.stdout.readline() == "removed web.test.shop.prod._http._tcp.local.\n"
        browser.communicate("\n", timeout=10)


def test_avahi_resolves_and_browses(names, tmp_path):
    config = tmp_path / "avahi.conf"
    config.write_text(
        "[server]\nuse-ipv6=no\nenable-dbus=yes\nallow-interfaces=eth0\n[wide-area]\nenable-wide-area=no\n"
    )
    script = f"""
mkdir -p /run/dbus
dbus-daemon --config-file=/usr/share/dbus-1/system.conf --address=unix:path={tmp_path}/bus --nofork --nopidfile &
export DBUS_SYSTEM_BUS_ADDRESS=unix:path={tmp_path}/bus
for _ in $(seq 50); do test -S {tmp_path}/bus && break; sleep 0.1; done
mount -t tmpfs tmpfs /run/avahi-daemon 2>/dev/null || {{ mkdir -p /run/avahi-daemon; }}
avahi-daemon -f {config} --no-drop-root --no-chroot --no-rlimits &
sleep 2
avahi-resolve -4 -n {NAME}
avahi-browse -trp _http._tcp
kill %2 %1
wait
"""
    inside = ["ip", "netns", "exec", names.container.name, "unshare", "--mount", "--pid", "--fork", "--kill-child"]
    done = subprocess.run([*inside, "bash", "-c", script], capture_output=True, text=True, timeout=40)
    assert f"{NAME}\t10.30.0.30" in done.stdout, done.stdout + done.stderr
    assert f"=;eth0;IPv4;web\\.test\\.shop\\.prod;Web Site;local;{NAME};10.30.0.30;80;" in done.stdout


def test_nothing_leaves_the_bridge(make_netns):
    with resolver(make_netns, [service()], (4,)) as names:
        sockets = names.node.command("ss", "-ulnH", "sport", "=", "5353")
        assert sockets.strip()
        assert all("%edge-br0" in line for line in sockets.strip().splitlines())
