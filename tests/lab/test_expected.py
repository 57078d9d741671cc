"""What a person who knows networks expects of ServiceIPs: the usual tools, over an underlay that is narrow.

The underlay's MTU is 1280, so that the path takes 1252 bytes of the overlay's 1450: less than IPv6 demands of any link.
"""

import json
import re
from collections.abc import Iterator

import pytest

from appliance.lab import lifecycle
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import UNDERLAY_MTU_MIN, Family, Spec
from tests.lab.conftest import NARROW
from tests.lab.helpers import (
    FAMILIES,
    NOTHING,
    background,
    balanced,
    instance_ip,
    leftovers,
    line,
    namespace_ip,
    probe,
    program,
    run,
)

pytestmark = pytest.mark.root
by_family = pytest.mark.parametrize("family", FAMILIES)

PATH_MTU: dict[Family, int] = {"v4": UNDERLAY_MTU_MIN - 28, "v6": UNDERLAY_MTU_MIN}
"""What a sender is told: over IPv6 never less than 1280 (RFC 8200 section 5), whatever the tunnel does for it."""
UNKNOWN: dict[Family, str] = {"v4": "10.30.77.77", "v6": "fdff:2000::77"}
AT_ONCE_S = 1.0
PORT, CLOSED = 7004, 4444
SCTP = 132
DNS_BYTES = 4_000


@pytest.fixture(scope="module")
def narrow() -> Iterator[Lab]:
    """Two nodes with two workers each on an underlay as narrow as IPv6 allows."""
    try:
        yield lifecycle.up(Spec(name=NARROW, workers=(2,), mtu=UNDERLAY_MTU_MIN))
    finally:
        lifecycle.down(NARROW)
    assert leftovers(NARROW) == NOTHING


def gateways(lab: Lab, family: Family) -> list[str]:
    """Each node's own address in the overlay: the next hop of its containers."""
    option = "-4" if family == "v4" else "-6"
    routes = [json.loads(run(lab, f"client{n}", "ip", option, "-j", "route", "show", "default")) for n in (1, 2)]
    return [str(it[0]["gateway"]) for it in routes]


@by_family
@pytest.mark.parametrize("method", ["udp", "icmp"])
def test_traceroute_shows_both_gateways_and_the_service(narrow: Lab, family: Family, method: str) -> None:
    """One probe at a time (-N 1): kernels limit the ICMP errors that they send to one host."""
    target = instance_ip(narrow, narrow.plan.web[1], family)
    output = run(narrow, "client1", "traceroute", "-n", "-q", "1", "-N", "1", "-w", "2", "-M", method, target)
    hops = re.findall(r"^ *\d+ +(\S+)", output, re.MULTILINE)
    assert hops == [*gateways(narrow, family), target], output


@by_family
def test_tracepath_finds_the_path_and_what_it_takes(narrow: Lab, family: Family) -> None:
    target = instance_ip(narrow, narrow.plan.web[1], family)
    output = run(narrow, "client1", "tracepath", "-n", "-m", "6", target)
    assert re.search(rf"^ *3: +{re.escape(target)} .*reached", output, re.MULTILINE), output
    assert f"pmtu {PATH_MTU[family]} hops 3" in output


@by_family
def test_ping_and_large_pings(narrow: Lab, family: Family) -> None:
    """Over IPv6 each instance may lose its first large answer: it learns from that what the path takes."""
    for size, lost in ((56, 0), (PATH_MTU[family] - 48, 0), (20_000, 0 if family == "v4" else len(narrow.plan.web))):
        command = ("ping", "-c", "5", "-i", "0.05", "-W", "2", "-s", str(size), balanced(family))
        received = re.search(r"(\d+) received", run(narrow, "client1", *command))
        assert received is not None
        assert int(received[1]) >= 5 - lost, size


@by_family
def test_a_large_file_arrives_whole(narrow: Lab, family: Family, long: bool) -> None:
    size = 100_000_000 if long else 5_000_000
    host = balanced(family) if family == "v4" else f"[{balanced(family)}]"
    command = ("curl", "-sSg", "-m", "60", "-o", "/dev/null", "-w", "%{size_download}", f"http://{host}/stream/{size}")
    for _ in range(2):  # one of each instance: by round robin, or near enough
        assert int(run(narrow, "client1", *command)) == size


@by_family
@pytest.mark.parametrize("container", ["web0", "web1"])
def test_udp_of_every_size_is_answered(narrow: Lab, family: Family, container: str) -> None:
    """Whole, in two fragments, in many; the first that the path does not take may have to teach its sender."""
    target = instance_ip(narrow, next(it for it in narrow.plan.web if it.name == container), family)
    with background(narrow, container, *program("datagrams", "serve", PORT)) as server:
        assert line(server) == "ready"
        for size in (64, 512, PATH_MTU[family] - 48, 1400, 20_000):
            done = json.loads(run(narrow, "client1", *program("datagrams", "send", target, PORT, size, 1, 10)))
            assert (done["datagrams"], done["wrong"]) == (10, 0)
            assert done["repeated"] <= 1, size


@by_family
def test_dns_over_udp_also_when_the_answer_comes_in_fragments(narrow: Lab, family: Family) -> None:
    """Three times what the path takes; over IPv6 the first large one may have to teach its sender: dig asks again."""
    target = instance_ip(narrow, narrow.plan.web[1], family)
    with background(narrow, "web1", *program("dns", DNS_BYTES)) as server:
        assert line(server) == "ready"
        ask = ("dig", f"@{target}", "+notcp", "+ignore", "+tries=3", "+timeout=2", "example.test", "TXT")
        small = run(narrow, "client1", *ask, "+bufsize=1232")
        assert re.search(r"flags: [a-z ]*\btc\b", small), small
        large = run(narrow, "client1", *ask, "+bufsize=8192")
        assert f"ANSWER: {DNS_BYTES // 255}," in large, large


@by_family
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("container", ["web0", "web1"])
def test_a_closed_port_refuses_at_once(narrow: Lab, family: Family, protocol: str, container: str) -> None:
    """For UDP by an ICMP error that was translated twice, or the kernel would not know the socket."""
    web = next(it for it in narrow.plan.web if it.name == container)
    for target in (instance_ip(narrow, web, family), balanced(family)):
        assert complaint(narrow, protocol, target, CLOSED) == "ECONNREFUSED"


@by_family
@pytest.mark.parametrize(("protocol", "error"), [("tcp", "ECONNREFUSED"), ("udp", "EHOSTUNREACH")])
def test_an_address_that_nobody_has_refuses_at_once(narrow: Lab, family: Family, protocol: str, error: str) -> None:
    assert complaint(narrow, protocol, UNKNOWN[family], CLOSED) == error


def complaint(lab: Lab, protocol: str, address: str, port: int) -> str | None:
    """How the kernel tells a client that it is not served; it has to be soon."""
    done = json.loads(run(lab, "client1", *program("complaint", protocol, address, port)))
    assert done["seconds"] < AT_ONCE_S, done
    return None if done["error"] is None else str(done["error"])


@by_family
def test_an_instance_calls_its_own_service(narrow: Lab, family: Family) -> None:
    """Round robin brings it to itself, too."""
    assert {it["container"] for it in probe(narrow, "web0", balanced(family), 8)} == {"web0", "web1"}


RECEIVE = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 132)
s.settimeout(10)
print("ready", flush=True)
data, peer = s.recvfrom(2048)
print(peer[0], data[20:].hex(), flush=True)
"""
SEND = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 132)
s.sendto(bytes.fromhex(sys.argv[2]), (sys.argv[1], 0))
"""


def test_sctp_is_carried_by_its_addresses(narrow: Lab) -> None:
    """From raw sockets, as not every kernel has SCTP: its checksum does not cover addresses, so it arrives as it is."""
    packet = "9c400050000000007a69c0de" + "0a00000401020304"  # a COOKIE ECHO, RFC 9260 section 3.3.11
    web = narrow.plan.web[1]
    with background(narrow, "web1", "python3", "-c", RECEIVE) as receiver:
        assert line(receiver) == "ready"
        run(narrow, "client1", "python3", "-c", SEND, instance_ip(narrow, web, "v4"), packet)
        client = instance_ip(narrow, narrow.plan.client(1), "v4")
        assert line(receiver) == f"{client} {packet}"
    assert namespace_ip(narrow, web, "v4") != client
