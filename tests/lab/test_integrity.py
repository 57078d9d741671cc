"""Bytes arrive as they were sent: with every offload, without each of them, with one worker and with two."""

import json
from contextlib import ExitStack
from typing import Any

import pytest

from appliance.lab.lifecycle import Lab
from appliance.lab.plan import Family, setting
from tests.lab.conftest import Build
from tests.lab.helpers import FAMILIES, background, balanced, instance_ip, line, program, result, run

pytestmark = pytest.mark.root
by_family = pytest.mark.parametrize("family", FAMILIES)

GIGABYTE = 10**9
SMALL = 24 * 2**20 + 12345
OFFLOADS = ["tun_tso", "tun_uso", "udp_gso", "udp_gro", "coalesce"]
SEGMENT, SEGMENTS, BURSTS = 1200, 20, 100
"""UDP as QUIC sends it: bursts of datagrams that the kernel may take as one super-packet."""
DIRECTIONS = ("to", "from")


def transfer(lab: Lab, family: Family, container: str, size: int, direction: str) -> None:
    """Through the demo's ServiceIP, to or from one instance: both ends have seen what was meant to be sent."""
    check(json.loads(run(lab, "client1", *transfer_program(family, container, size, direction), timeout=120)))


def transfer_program(family: Family, container: str, size: int, direction: str) -> list[str]:
    return program("transfer", balanced(family), container, size, direction)


def check(done: dict[str, Any]) -> None:
    assert done == dict.fromkeys(("expected", "sent", "received"), done["expected"])


def bursts(lab: Lab, address: str) -> None:
    """Super-packets of UDP to web1 and back, each datagram with its own content."""
    with background(lab, "web1", *program("datagrams", "serve", 7002)) as server:
        assert line(server) == "ready"
        done = json.loads(run(lab, "client1", *program("datagrams", "send", address, 7002, SEGMENT, SEGMENTS, BURSTS)))
    assert done == {"datagrams": SEGMENTS * BURSTS, "repeated": 0, "wrong": 0}


@by_family
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_gigabyte_between_nodes(lab: Lab, family: Family, direction: str) -> None:
    transfer(lab, family, "web1", GIGABYTE, direction)


@by_family
def test_two_hundred_megabytes_on_one_node(lab: Lab, family: Family) -> None:
    transfer(lab, family, "web0", GIGABYTE // 5, "to")


@by_family
def test_udp_super_packets(lab: Lab, family: Family) -> None:
    bursts(lab, instance_ip(lab, lab.plan.web[1], family))


@by_family
def test_sixteen_connections_at_once(lab: Lab, family: Family) -> None:
    """Interleaved flows: what is joined or cut never mixes them."""
    kinds = [(container, direction) for container in ("web0", "web1") for direction in DIRECTIONS] * 4
    with ExitStack() as stack:
        running = [
            stack.enter_context(background(lab, "client1", *transfer_program(family, container, SMALL // 4, direction)))
            for container, direction in kinds
        ]
        for done in map(result, running):
            check(done)


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"without {name}": {"settings": (setting(f"offload.{name}=false"),)} for name in OFFLOADS},
    "without any offload": {"settings": tuple(setting(f"offload.{name}=false") for name in OFFLOADS)},
    "tunnel over IPv6": {"tunnel": "v6"},
    "an underlay that cuts": {"cut": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_arrive(build: Build, variant: str, long: bool) -> None:
    """Every way through the packet path, out of a node with one worker and out of one with two. --long: a gigabyte."""
    lab = build(workers=(1, 2), **VARIANTS[variant])
    for family in FAMILIES:
        for direction in DIRECTIONS:
            transfer(lab, family, "web1", GIGABYTE if long else SMALL, direction)
        transfer(lab, family, "web0", SMALL, "to")
        bursts(lab, instance_ip(lab, lab.plan.web[1], family))


def test_a_gigabyte_with_one_worker(build: Build) -> None:
    transfer(build(workers=(1,)), "v4", "web1", GIGABYTE, "to")
