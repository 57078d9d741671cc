"""Packets through what the manager made: between containers, and through the TUN in both directions.

    container ── veth ── bridge ── TUN ══ this test, in the place of the workers

Every packet is sent right after `attach` returns: nothing here waits for duplicate address detection, for
a bridge's port to forward, or for a link to come up.
"""

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import pytest
from pytun import IFF_NO_PI, IFF_TUN, TunTapDevice

from appliance.environment import Attachment
from tests.environment.netns import TUN, Netns
from tests.environment.settings import attach, converged
from tests.oracle import build
from tests.oracle.packet import read

pytestmark = pytest.mark.root

MakeNetns = Callable[[], Netns]
TIMEOUT = 1.0
"""Seconds. Duplicate address detection alone takes one."""
SERVICE_IPS = {4: "10.30.30.30", 6: "fdff:2000::30"}
PEER_INSTANCE_IPS = {4: "10.30.0.2", 6: "fdff::2"}


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def version(request: pytest.FixtureRequest) -> int:
    """The IP version."""
    return int(request.param)


@pytest.fixture
def strict_node(node: Netns) -> Netns:
    """A node whose administrator drops whatever does not come from where it would be sent to."""
    for link in ("all", "default"):
        node.set_sysctl(f"net/ipv4/conf/{link}/rp_filter", "1")
    return node


def address_of(attachment: Attachment, version: int) -> str:
    """A container's address."""
    return str(attachment.address_v4 if version == 4 else attachment.address_v6)


def gateway_of(attachment: Attachment, version: int) -> str:
    """A container's gateway."""
    return str(attachment.gateway_v4 if version == 4 else attachment.gateway_v6)


@contextmanager
def udp(namespace: Netns, address: str) -> Iterator[socket.socket]:
    """A UDP socket that is bound to an address in a namespace."""

    def bound() -> socket.socket:
        family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6
        made = socket.socket(family, socket.SOCK_DGRAM)
        made.bind((address, 0))
        made.settimeout(TIMEOUT)
        return made

    with namespace.call(bound) as opened:
        yield opened


@contextmanager
def tun(node: Netns) -> Iterator[int]:
    """The descriptor of the node's TUN link."""
    device = node.call(lambda: TunTapDevice(name=TUN, flags=IFF_TUN | IFF_NO_PI))
    os.set_blocking(device.fileno(), False)
    try:
        yield device.fileno()
    finally:
        device.close()


def read_udp(fd: int, destination: str) -> bytes:
    """The next packet to a destination that comes out of the TUN."""
    while select.select([fd], [], [], TIMEOUT)[0]:
        data = os.read(fd, 65535)
        at = 16 if data[0] >> 4 == 4 else 24
        packed = ip_address(destination).packed
        if data[at : at + len(packed)] == packed:
            return data
    raise TimeoutError(f"nothing to {destination} came out of the TUN")


async def attached(*containers: Netns) -> list[Attachment]:
    """Attachments of containers to a node that is made for them."""
    manager = await converged()
    return [await attach(manager, it, number) for number, it in enumerate(containers)]


def test_between_containers_of_a_node(node: Netns, make_netns: MakeNetns, version: int) -> None:
    here, there = make_netns(), make_netns()
    first, second = node.run(lambda: attached(here, there))
    with udp(here, address_of(first, version)) as one, udp(there, address_of(second, version)) as other:
        one.sendto(b"hello", other.getsockname())
        data, source = other.recvfrom(100)
        other.sendto(data.upper(), source)
        assert one.recv(100) == b"HELLO"


def test_between_a_container_and_its_gateway(node: Netns, container: Netns, version: int) -> None:
    (attachment,) = node.run(lambda: attached(container))
    gateway, address = gateway_of(attachment, version), address_of(attachment, version)
    with udp(node, gateway) as one, udp(container, address) as other:
        other.sendto(b"hello", one.getsockname())
        assert one.recv(100) == b"hello"


def test_a_container_reaches_itself(node: Netns, container: Netns, version: int) -> None:
    """By its own address, which the kernel routes through the loopback link."""
    (attachment,) = node.run(lambda: attached(container))
    with udp(container, address_of(attachment, version)) as one:
        one.sendto(b"hello", one.getsockname())
        assert one.recv(100) == b"hello"


def test_to_a_service_and_back(strict_node: Netns, container: Netns, version: int) -> None:
    """The workers' view: the ServiceIP comes out of the TUN, its answer goes in. The kernel routes both,
    so each has a hop less to go."""
    service = SERVICE_IPS[version]
    with tun(strict_node) as fd:
        (attachment,) = strict_node.run(lambda: attached(container))
        with udp(container, address_of(attachment, version)) as client:
            client.sendto(b"hello", (service, 5000))
            packet = read(read_udp(fd, service))
            assert (packet.source, packet.destination) == tuple(
                map(ip_address, (address_of(attachment, version), service))
            )
            port = client.getsockname()[1]
            os.write(fd, build.udp(service, address_of(attachment, version), 5000, port, b"answer"))
            assert client.recvfrom(100)[:1] == (b"answer",)


def test_from_a_container_of_another_node(strict_node: Netns, container: Netns, version: int) -> None:
    with tun(strict_node) as fd:
        (attachment,) = strict_node.run(lambda: attached(container))
        with udp(container, address_of(attachment, version)) as server:
            destination, port = server.getsockname()[:2]
            os.write(fd, build.udp(PEER_INSTANCE_IPS[version], destination, 5000, port, b"call"))
            data, source = server.recvfrom(100)
            assert (data, source[0]) == (b"call", PEER_INSTANCE_IPS[version])


def test_from_a_container_of_this_node_through_the_tun(strict_node: Netns, make_netns: MakeNetns, version: int) -> None:
    """Its route leads to the bridge, and the packet comes from the TUN: strict filtering would drop it."""
    with tun(strict_node) as fd:
        client, server = (make_netns() for _ in range(2))
        first, second = strict_node.run(lambda: attached(client, server))
        with udp(server, address_of(second, version)) as one:
            destination, port = one.getsockname()[:2]
            os.write(fd, build.udp(address_of(first, version), destination, 5000, port, b"call"))
            assert one.recv(100) == b"call"


def test_the_mtu_is_that_of_the_overlay(node: Netns, container: Netns) -> None:
    """A packet of the MTU passes; the kernel refuses one byte more."""
    with tun(node) as fd:
        (attachment,) = node.run(lambda: attached(container))
        with udp(container, address_of(attachment, 6)) as client:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 1)
            client.sendto(bytes(1450 - 48), (SERVICE_IPS[6], 5000))
            assert len(read_udp(fd, SERVICE_IPS[6])) == 1450
            with pytest.raises(OSError, match="Message too long"):
                client.sendto(bytes(1450 - 47), (SERVICE_IPS[6], 5000))


def test_the_node_itself_says_nothing_into_the_overlay(node: Netns) -> None:
    """But for two reports to ff02::16 without a source, which the kernel sends when a link comes up."""
    with tun(node) as fd:
        node.run(converged)
        while select.select([fd], [], [], TIMEOUT)[0]:
            data = os.read(fd, 65535)
            assert data[0] >> 4 == 6
            assert data[8:24] == bytes(16)
    (link,) = node.json("addr", "show", "dev", TUN)
    assert [it["family"] for it in link["addr_info"]] == ["inet"]


def test_the_node_speaks_through_the_tun(strict_node: Netns, container: Netns, version: int) -> None:
    """What a worker has to say to a container bears the gateway's address, which is the node's own."""
    with tun(strict_node) as fd:
        (attachment,) = strict_node.run(lambda: attached(container))
        address, gateway = address_of(attachment, version), gateway_of(attachment, version)
        with udp(container, address) as client:
            os.write(fd, build.udp(gateway, address, 5000, client.getsockname()[1], b"unreachable"))
            assert client.recv(100) == b"unreachable"
