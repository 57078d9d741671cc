"""The kernel's eBPF program and the compiled hash agree, on real sockets."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import struct

import pytest

from appliance.dataplane import bpf, steering
from appliance.supervisor import sockets
from appliance.tables import layout

pytestmark = pytest.mark.root


def ipv4(
    destination: bytes, ports: tuple[int, int], *, options: int = 0, protocol: int = 17, fragment: int = 0
) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", 0x45 + options, 0, 0, 0, fragment, 64, protocol, 0, bytes(4), destination)
    return head + bytes(4 * options) + transport(protocol, ports)


def ipv6(destination: bytes, ports: tuple[int, int], *, protocol: int = 17) -> bytes:
    return struct.pack("!IHBB16s16s", 6 << 28, 8, protocol, 64, bytes(16), destination) + transport(protocol, ports)


def transport(protocol: int, ports: tuple[int, int]) -> bytes:
    if protocol in (1, 58):
        return struct.pack("!BBHHH", 8, 0, 0, ports[0], 1)
    return struct.pack("!HHHH", *ports, 8, 0)


@pytest.fixture(params=[2, 3, 5])
def group(request: pytest.FixtureRequest):
    """A steered SO_REUSEPORT group and the address of its port."""
    opened = [sockets.dual_stack("::", 0, 65_536, reuse=True)]
    port = opened[0].getsockname()[1]
    opened += [sockets.dual_stack("::", port, 65_536, reuse=True) for _ in range(request.param - 1)]
    program = bpf.load(bpf.SOCKET_FILTER, steering.program(request.param, inbound=True), "test")
    opened[0].setsockopt(socket.SOL_SOCKET, sockets.SO_ATTACH_REUSEPORT_EBPF, struct.pack("i", program))
    os.close(program)
    yield opened, ("127.0.0.1", port)
    for sock in opened:
        sock.close()


def receiver(opened: list[socket.socket]) -> int:
    found = []
    for index, sock in enumerate(opened):
        try:
            sock.recv(2_048)
            found.append(index)
        except BlockingIOError:
            continue
    assert len(found) == 1
    return found[0]


def test_kernel_and_hash_choose_the_same_worker(group: tuple[list[socket.socket], tuple[str, int]]) -> None:
    opened, address = group
    rng = random.Random(7)
    seen = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(300):
            ports = (rng.randrange(65_536), rng.randrange(65_536))
            if number % 2:
                target = ipaddress.ip_address(rng.randbytes(4))
                packet = ipv4(target.packed, ports, options=rng.choice([0, 2]), protocol=rng.choice([6, 17, 132]))
            else:
                target = ipaddress.ip_address(rng.randbytes(16))
                packet = ipv6(target.packed, ports, protocol=rng.choice([6, 17]))
            sender.sendto(packet, address)
            expected = int(steering.steer(*layout.words(target), *ports)) % len(opened)
            assert receiver(opened) == expected, packet.hex()
            seen.add(expected)
    assert seen == set(range(len(opened)))


@pytest.mark.parametrize("protocol", [1, 58])
def test_echo_is_steered_by_its_identifier(group: tuple[list[socket.socket], tuple[str, int]], protocol: int) -> None:
    opened, address = group
    target = ipaddress.ip_address("10.18.0.2" if protocol == 1 else "fc00::2")
    make = ipv4 if protocol == 1 else ipv6
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for identifier in range(40):
            sender.sendto(make(target.packed, (identifier, 0), protocol=protocol), address)
            assert receiver(opened) == steering.steer(*layout.words(target), identifier, 0) % len(opened)


def test_fragments_and_garbage_reach_somebody(group: tuple[list[socket.socket], tuple[str, int]]) -> None:
    opened, address = group
    target = ipaddress.ip_address("10.18.0.2")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for fragment in (0x2000, 0x0010):
            sender.sendto(ipv4(target.packed, (1, 2), fragment=fragment), address)
            assert receiver(opened) == steering.steer(*layout.words(target), 0, 0) % len(opened)
        for garbage in (b"", b"\x45", b"\x60" + bytes(20), b"\xff" * 60):
            sender.sendto(garbage, address)
            assert receiver(opened) == 0


def test_both_directions_of_a_flow_hash_alike() -> None:
    local = layout.words("10.18.0.2")
    assert steering.steer(*local, 40_000, 80) == steering.steer(*local, 80, 40_000)
