"""The resolver as a process, asked by dig from a container."""

import socket
import sys
import time

import pytest

from tests.naming.driver import GATEWAYS, JOB, NAME, Driver, resolver, service

pytestmark = pytest.mark.root


@pytest.fixture
def names(make_netns):
    """A resolver with one service."""
    with resolver(make_netns, [service()]) as driver:
        yield driver


def short(names: Driver, *arguments: str, server: str = GATEWAYS[0]) -> list[str]:
    return names.dig("+short", *arguments, server=server).split("\n")[:-1]


@pytest.mark.parametrize("server", GATEWAYS)
@pytest.mark.parametrize("over", ["+notcp", "+tcp"])
@pytest.mark.parametrize("edns", ["+edns", "+noedns"])
def test_addresses_over_every_way(make_netns, server, over, edns):
    with resolver(make_netns, [service()]) as names:
        for name, v4, v6 in (
            (NAME, "10.30.0.30", "fdff:2000::1e"),
            (f"closest.{NAME}", "10.30.100.30", "fdff:1000::1e"),
            (f"0.{NAME}", "10.30.200.1", "fdff::1"),
            (f"0.closest.{NAME}", "10.30.200.1", "fdff::1"),
            ("web.test.shop.prod.svc.example", "10.30.0.30", "fdff:2000::1e"),
        ):
            for _ in range(2):  # from the zone, and hot
                assert short(names, over, edns, name, "A", server=server) == [v4]
                assert short(names, over, edns, name, "AAAA", server=server) == [v6]


def test_service_records(names):
    for _ in range(2):
        assert short(names, NAME, "SRV") == [f"0 0 80 {NAME}.", f"0 0 8080 {NAME}."]
        assert short(names, f"_http._tcp.{NAME}", "SRV") == [f"0 0 80 {NAME}."]
        assert short(names, NAME, "TXT") == ['"version=3" "path=/"']
        assert short(names, NAME, "ANY") == ['"RFC8482" ""']


def test_pointers(names):
    assert short(names, "-x", "10.30.0.30") == [f"{NAME}."]
    assert short(names, "-x", "10.30.100.30") == [f"closest.{NAME}."]
    assert short(names, "-x", "10.30.200.2") == [f"1.{NAME}."]
    assert short(names, "-x", "fdff:2000::1e") == [f"{NAME}."]
    assert "status: NXDOMAIN" in names.dig("-x", "10.18.0.9")


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        (NAME, "MX", "NOERROR"),
        (f"1.{NAME}", "AAAA", "NOERROR"),
        ("test.shop.prod.local", "A", "NOERROR"),
        (f"7.{NAME}", "A", "NXDOMAIN"),
        (f"maglev.{NAME}", "A", "NXDOMAIN"),
        ("other.local", "A", "NXDOMAIN"),
        (f"a.b.c.{NAME}", "A", "NXDOMAIN"),
    ],
)
def test_what_is_not_there(names, name, kind, status):
    for _ in range(2):
        said = names.dig(name, kind)
        assert f"status: {status}" in said
        assert "ANSWER: 0, AUTHORITY: 1" in said
        assert "SOA\tns.local. hostmaster.local. 1 3600 600 86400 2" in said


def test_spelling_is_kept(names):
    spelled = "wEb.TesT.shOp.Prod.LOCAL"
    for _ in range(2):
        said = names.dig("+qr", spelled, "A")
        assert [f"{spelled}.", "5", "IN", "A", "10.30.0.30"] in [line.split() for line in said.splitlines()]


def test_too_long_is_truncated_and_asked_again(make_netns):
    long = service(metadata=[f"key{number}=" + "x" * 200 for number in range(20)])
    with resolver(make_netns, [long]) as names:
        assert "flags: qr aa tc rd ra" in names.dig("+ignore", "+notcp", NAME, "TXT")
        assert len(names.dig("+short", NAME, "TXT")) > 4000


def test_opcode_version_and_class(names):
    assert "status: NOTIMP" in names.dig("+opcode=STATUS", NAME)
    assert "status: BADVERS" in names.dig("+edns=1", "+noednsnegotiation", NAME)
    assert "status: REFUSED" in names.dig("-c", "CH", "version.bind", "TXT")


def test_answers_follow_a_change(names):
    assert short(names, NAME) == ["10.30.0.30"]
    names.say(put=[service(number=31)], gone=[])
    assert names.counters()["services"] == 1
    assert short(names, NAME) == ["10.30.0.31"]
    names.say(put=[], gone=[JOB])
    names.counters()


def test_a_change_is_answered_within_10_ms(names):
    question = b"".join(bytes((len(it),)) + it.encode() for it in NAME.split(".")) + b"\0\0\1\0\1"

    def until_changed(number: int) -> float:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((GATEWAYS[0], 53))
            sock.settimeout(2)
            names.say(put=[service(number=number)], gone=[])
            began = time.monotonic()
            while time.monotonic() - began < 2:
                sock.send(b"\0\1\1\0\0\1\0\0\0\0\0\0" + question)
                if sock.recv(512).endswith(bytes((10, 30, 0, number))):
                    break
            return time.monotonic() - began

    took = sorted(names.container.call(lambda number=number: until_changed(number)) for number in range(100, 120))
    assert took[len(took) // 2] < 0.010


def test_no_supervisor(names):
    names.socket.close()
    assert short(names, NAME) == ["10.30.0.30"]
    assert "status: SERVFAIL" in names.dig("new.test.shop.prod.local")
    assert names.process.poll() is None


def test_c_ares_as_a_stub_resolver(names):
    ask = f"""
import asyncio, aiodns
async def main():
    async with aiodns.DNSResolver(["{GATEWAYS[0]}"]) as resolver:
        for kind in ("A", "AAAA"):
            result = await resolver.query_dns("{NAME}", kind)
            print(result.answer[0].data.addr)
asyncio.run(main())
"""
    assert names.container.command(sys.executable, "-c", ask).split() == ["10.30.0.30", "fdff:2000::1e"]
