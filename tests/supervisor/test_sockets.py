"""What the kernel does with packets that are too big, on the sockets as the supervisor opens them.

A namespace has one link, of MTU 1280, and behind it an IPv4 route of MTU 1000; IPv6 has no MTU below 1280.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.supervisor import sockets
from tests.environment import netns
from tests.environment.netns import Netns

pytestmark = pytest.mark.root

LINK = "narrow"
NEIGHBOURS = {"IPv4-mapped": "::ffff:198.51.100.2", "IPv6": "2001:db8:1::2"}
BEHIND = "::ffff:203.0.113.1"
TRAIN = 3
OVERHEAD = {"IPv4-mapped": 28, "IPv6": 48}


@pytest.fixture(scope="module")
def narrow() -> Iterator[Netns]:
    """A namespace with one link, of MTU 1280."""
    with netns.namespaces() as make:
        made = make()
        made.ip("link", "set", "lo", "up")
        made.ip("link", "add", LINK, "mtu", "1280", "type", "veth", "peer", "name", "nobody")
        made.ip("link", "set", "nobody", "up")
        made.ip("link", "set", LINK, "up")
        made.ip("addr", "add", "198.51.100.1/24", "dev", LINK)
        made.ip("addr", "add", "2001:db8:1::1/64", "dev", LINK, "nodad")
        for neighbour in ("198.51.100.2", "2001:db8:1::2"):
            made.ip("neigh", "add", neighbour, "lladdr", "02:00:00:00:00:02", "dev", LINK)
        made.ip("route", "add", "203.0.113.0/24", "via", "198.51.100.2", "mtu", "1000")
        yield made


@pytest.fixture
def opened(narrow: Netns) -> Iterator[sockets.WorkerSockets]:
    """One worker's sockets in there."""
    (worker,) = narrow.call(lambda: sockets.open_all(1, 50103, 2, 1 << 20, gro=False))
    yield worker
    worker.close()


@pytest.fixture(params=list(NEIGHBOURS))
def family(request: pytest.FixtureRequest) -> str:
    """How the destination is spelled."""
    return str(request.param)


def fragments(namespace: Netns) -> int:
    """Fragments that the kernel has made, of both families."""

    def read() -> int:
        v4 = [line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines() if line[:3] == "Ip:"]
        v6 = dict(line.split() for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines())
        return int(dict(zip(*v4, strict=True))["FragCreates"]) + int(v6["Ip6FragCreates"])

    return namespace.call(read)


def send(sock: socket.socket, destination: str, size: int, segment: int = 0) -> int:
    """What ``sendmsg`` says: 0, or an error."""
    control = [(sockets.SOL_UDP, sockets.UDP_SEGMENT, struct.pack("H", segment))] if segment else []
    try:
        assert sock.sendmsg([bytes(size)], control, 0, (destination, 9)) == size
    except OSError as error:
        return error.errno or 0
    return 0


def strict(worker: sockets.WorkerSockets) -> list[socket.socket]:
    """The sockets on which nothing may be fragmented."""
    return [worker.wire, *worker.sources]


def test_what_fits_to_the_byte_leaves(opened: sockets.WorkerSockets, family: str) -> None:
    most = 1280 - OVERHEAD[family]
    for sock in [*strict(opened), opened.fragmenting]:
        assert send(sock, NEIGHBOURS[family], most) == 0
        assert send(sock, NEIGHBOURS[family], TRAIN * most, most) == 0


def test_nothing_is_fragmented_silently(narrow: Netns, opened: sockets.WorkerSockets, family: str) -> None:
    before, least = fragments(narrow), 1280 - OVERHEAD[family] + 1
    for sock in strict(opened):
        assert send(sock, NEIGHBOURS[family], least) == errno.EMSGSIZE
        assert send(sock, NEIGHBOURS[family], TRAIN * least, least) in (errno.EMSGSIZE, errno.EINVAL)
    assert fragments(narrow) == before


def test_the_routes_mtu_counts_too(narrow: Netns, opened: sockets.WorkerSockets) -> None:
    before = fragments(narrow)
    for sock in strict(opened):
        assert send(sock, BEHIND, 972) == 0
        assert send(sock, BEHIND, 973) == errno.EMSGSIZE
    assert fragments(narrow) == before


def test_what_may_be_fragmented_is(narrow: Netns, opened: sockets.WorkerSockets, family: str) -> None:
    before = fragments(narrow)
    assert send(opened.fragmenting, NEIGHBOURS[family], 1400) == 0
    assert fragments(narrow) == before + 2


def test_trains_are_never_fragmented(narrow: Netns, opened: sockets.WorkerSockets, family: str) -> None:
    before = fragments(narrow)
    assert send(opened.fragmenting, NEIGHBOURS[family], 1400, 1400) in (errno.EMSGSIZE, errno.EINVAL)
    assert send(opened.fragmenting, NEIGHBOURS[family], TRAIN * 1400, 1400) in (errno.EMSGSIZE, errno.EINVAL)
    assert fragments(narrow) == before
