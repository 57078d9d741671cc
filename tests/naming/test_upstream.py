"""Names that are not ours, from a real server (dnsmasq) behind the resolver."""

import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from appliance.naming.upstream import of_host, split
from tests.naming.driver import NAME, Driver, resolver, service

UPSTREAM = "10.18.0.60"
RECORDS = [
    "--host-record=www.example.org,192.0.2.7,2001:db8::7",
    "--cname=alias.example.org,www.example.org",
    "--mx-host=example.org,mail.example.org,10",
    "--txt-record=example.org,one,two words",
    "--srv-host=_sip._udp.example.org,sip.example.org,5060,1,2",
    "--naptr-record=example.org,1,2,s,SIP+D2U,,_sip._udp.example.org",
    "--caa-record=example.org,0,issue,ca.example",
    "--dns-rr=www.example.org,65,000100",
    "--local=/example.org/",
]


@pytest.fixture
def names(make_netns) -> Iterator[Driver]:
    """A resolver with an upstream server on the node, and one before it that is not there."""
    with resolver(make_netns, [service()], upstreams=["10.18.0.61", UPSTREAM], upstream_timeout=3.0) as driver:
        driver.node.ip("addr", "add", f"{UPSTREAM}/32", "dev", "lo")
        long = [f"--host-record=many.example.org,192.0.2.{number}" for number in range(1, 120)]
        command = [
            "dnsmasq",
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
            "--pid-file=",
        ]
        command += [
            f"--listen-address={UPSTREAM}",
            "--bind-interfaces",
            "--local-ttl=60",
            "--user=root",
            *RECORDS,
            *long,
        ]
        with subprocess.Popen(["ip", "netns", "exec", driver.node.name, *command]) as server:
            time.sleep(0.3)
            yield driver
            server.terminate()


@pytest.mark.root
@pytest.mark.skipif(shutil.which("dnsmasq") is None, reason="needs dnsmasq")
def test_every_type_is_forwarded(names: Driver) -> None:
    for name, kind, expected in (
        ("www.example.org", "A", ["192.0.2.7"]),
        ("www.example.org", "AAAA", ["2001:db8::7"]),
        ("alias.example.org", "A", ["www.example.org.", "192.0.2.7"]),
        ("example.org", "MX", ["10 mail.example.org."]),
        ("example.org", "TXT", ['"one" "two words"']),
        ("_sip._udp.example.org", "SRV", ["1 2 5060 sip.example.org."]),
        ("example.org", "NAPTR", ['1 2 "s" "SIP+D2U" "" _sip._udp.example.org.']),
        ("example.org", "CAA", ['0 issue "ca.example"']),
        ("www.example.org", "HTTPS", ["1 ."]),
    ):
        assert names.dig("+short", name, kind).splitlines() == expected, (name, kind)
    assert "status: NXDOMAIN" in names.dig("none.example.org")
    assert "status: NOERROR" in names.dig("www.example.org", "MX")
    assert len(names.dig("+short", "many.example.org").split()) == 119, "over TCP, on both sides"
    assert names.dig("+short", NAME) == "10.30.0.30\n"


@pytest.mark.root
def test_answers_are_kept_and_age(names: Driver) -> None:
    assert names.dig("+short", "www.example.org") == "192.0.2.7\n"
    time.sleep(1.1)
    ttl = int(names.dig("+noall", "+answer", "www.example.org").split()[1])
    assert 50 < ttl < 60
    assert names.counters()["upstream-cached"] == 1


def test_addresses_of_servers() -> None:
    assert split("192.0.2.1") == ("192.0.2.1", 53)
    assert split("192.0.2.1:5353") == ("192.0.2.1", 5353)
    assert split("2001:db8::1") == ("2001:db8::1", 53)
    assert split("[2001:db8::1]:5353") == ("2001:db8::1", 5353)
    with pytest.raises(ValueError, match="does not appear to be"):
        split("dns.example")


def test_the_hosts_servers(tmp_path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("# x\nnameserver 192.0.2.1\nsearch a.example b.example\nnameserver 2001:db8::1\noptions ndots:1\n")
    assert of_host(file) == (["192.0.2.1", "2001:db8::1"], ["a.example", "b.example"])
    assert of_host(tmp_path / "none") == ([], [])
