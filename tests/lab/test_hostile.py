"""Tunnel packets from a neighbour on the underlay who is no node, or takes a node's address (RFC 7348 section 7)."""

import json
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from appliance.lab.lifecycle import Lab
from tests.conftest import ROOT
from tests.lab.helpers import (
    TIMEOUT_S,
    balanced,
    environment,
    instance_ip,
    line,
    namespace_ip,
    probe,
    program,
    run,
    until,
)

pytestmark = pytest.mark.root

MARK = b"a forged packet"
TIMES = 20
STRANGER = "198.18.99.99"
TUNNEL_PORT = 50103
ASKED_S = 8.0
"""A packet whose sender the cluster may still name waits for the answer, 5 s at most, before it is dropped."""


def datagram(source: str, target: str, port: int = 80) -> bytes:
    """An IPv4 packet with a UDP datagram that has no checksum, all of it right."""
    udp = struct.pack("!HHHH", 40_000, port, 8 + len(MARK), 0) + MARK
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return header[:10] + struct.pack("!H", 0xFFFF - ((total & 0xFFFF) + (total >> 16))) + header[12:] + udp


def drops(lab: Lab) -> Counter[str]:
    """What the workers of node 2 have dropped from the wire, by reason."""
    workers = lab.api(lab.plan.nodes[1]).status()["workers"]
    return sum((Counter(it["drops"]["wire"]) for it in workers), Counter())


def pids(lab: Lab) -> list[int]:
    return [it["pid"] for it in lab.api(lab.plan.nodes[1]).status()["workers"]]


@contextmanager
def witnesses(lab: Lab) -> Iterator[Callable[[], list[int]]]:
    """Looks at all that reaches the containers of node 2; the function gives how many forged packets each got."""
    names = [it.name for it in lab.plan.containers if it.node.number == 2]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(
            lab.command(it, program("witness", "eth0", MARK.hex())),
            env=environment(lab),
            cwd=ROOT,
            **pipes,
        )
        for it in names
    ]
    try:
        assert [line(it) for it in running] == ["ready"] * len(running)
        yield lambda: [int(it.communicate(timeout=TIMEOUT_S)[0]) for it in running]
    finally:
        for it in running:
            it.kill()
            it.communicate()


def forge(lab: Lab, source: str, inner: bytes) -> None:
    """Sends a packet of our own to node 2, TIMES times."""
    (uplink,) = json.loads(run(lab, "node2", "ip", "-j", "link", "show", "uplink"))
    target = str(lab.plan.nodes[1].underlay_v4)
    run(lab, "underlay", *program("forger", "underlay", uplink["address"], source, target, TIMES, inner.hex()))


CASES: dict[str, tuple[str, bool, str]] = {
    "from a stranger on the underlay": ("192.0.2.1", False, "unknown-peer"),
    "from another node's container": ("10.30.0.1", True, "peer-spoof"),
    "from a stranger inside": ("192.0.2.1", True, "peer-spoof"),
    **{f"to {it}": (it, True, "not-local") for it in ("127.0.0.1", "224.0.0.1", "169.254.1.1", "198.18.0.2")},
    "to the gateway": ("gateway", True, "not-local"),
    "a tunnel packet inside": ("nested", True, "nested-overlay"),
    "with trailing bytes": ("long", True, "malformed"),
    "cut short": ("short", True, "malformed"),
}


def packet(lab: Lab, what: str, name: str) -> bytes:
    """The inner packet of a case."""
    client, web = instance_ip(lab, lab.plan.client(1), "v4"), namespace_ip(lab, lab.plan.web[1], "v4")
    if name.startswith("to "):
        (route,) = json.loads(run(lab, "web1", "ip", "-4", "-j", "route", "show", "default"))
        return datagram(client, route["gateway"] if what == "gateway" else what)
    if what == "nested":
        return datagram(client, web, TUNNEL_PORT)
    if what in ("long", "short"):
        whole = datagram(client, web)
        return whole + MARK if what == "long" else whole[:-1]
    return datagram(what or client, web)


@pytest.mark.parametrize("name", CASES)
def test_what_no_node_would_send_reaches_nobody_and_is_counted(lab: Lab, name: str) -> None:
    what, as_node, reason = CASES[name]
    before, workers = drops(lab), pids(lab)
    with witnesses(lab) as seen:
        forge(lab, str(lab.plan.nodes[0].underlay_v4) if as_node else STRANGER, packet(lab, what, name))
        until(lambda: (drops(lab) - before)[reason] >= TIMES, f"{TIMES} dropped as {reason}", ASKED_S)
        assert probe(lab, "client1", balanced("v4"), 2)
        assert seen() == [0, 0]
    assert drops(lab) - before == {reason: TIMES}
    assert pids(lab) == workers


def test_the_witness_sees_what_a_node_may_send(lab: Lab) -> None:
    """Or the tests above would prove nothing."""
    with witnesses(lab) as seen:
        forge(lab, str(lab.plan.nodes[0].underlay_v4), packet(lab, "", "valid"))
        probe(lab, "client1", balanced("v4"), 2)
        assert sorted(seen()) == [0, TIMES]
