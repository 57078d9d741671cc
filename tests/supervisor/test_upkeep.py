"""What others do to a node, in a real cluster and the real kernel, and a repair that does not succeed at once."""

import asyncio
import time
from functools import partial
from typing import Any, cast

import pytest

from appliance.environment.errors import EnvironmentError_
from appliance.environment.manager import EnvironmentManager
from appliance.supervisor import upkeep
from appliance.supervisor.upkeep import Upkeep
from tests.environment.netns import BRIDGE, TUN, command
from tests.supervisor.pair import CLIENTS, Pair, Service
from tests.supervisor.sockets import connect, say, tcp_echo
from tests.supervisor.world import HUB, Node, ping, until


def counted(node: Node) -> dict[str, Any]:
    """What the node has noticed so far."""
    return dict(node.api.status()["upkeep"])


PROMISED_S = 5.0
"""Seconds within which another uplink address is in the other nodes' tables."""


@pytest.mark.root
def test_a_container_that_vanishes_is_withdrawn_within_a_second(pair: Pair) -> None:
    with pair.service() as service:
        assert ping(pair.client, service.address)
        assert service.namespace_ip in pair.two.hosts()
        command("ip", "netns", "del", service.container.name)
        vanished = time.monotonic()
        until(lambda: not pair.is_up(service.job), "the cluster has heard of it", 1)
        until(lambda: service.namespace_ip not in pair.two.hosts(), "the other node does not send to it", 1)
        assert time.monotonic() - vanished < 1
        assert counted(pair.one)["gone"] == 1
        assert pair.one.api.attachments() == []


@pytest.mark.root
def test_another_uplink_address_is_announced_and_traffic_goes_on(pair: Pair) -> None:
    """A connection too: it ends at the same instance, wherever that one's node is reached.

    The second change follows within a second of the first, which brokers take for two nodes that share a name.
    """
    node = pair.one
    with pair.service() as service, tcp_echo(service.container):
        connection, _ = connect(pair.client, service.address)
        with connection:
            for address in ("192.0.2.77", node.address):
                renumber(node, address)
                until(partial(is_reached_at, pair, service, address), "the other node knows", PROMISED_S)
                assert say(connection, address.encode()) == address.encode()
                assert node.api.status()["node"]["address"] == address
    assert counted(node)["uplink_changed"] >= 2
    assert node.api.cluster()["counters"]["stranded"] == 2, "the connection to the broker had its address too"


def is_reached_at(pair: Pair, service: Service, address: str) -> bool:
    """Whether the client's node sends a service's packets to an address."""
    host = pair.two.hosts().get(service.namespace_ip)
    return host is not None and host["node"] == address


def renumber(node: Node, address: str) -> None:
    """Another lease: the old address is gone, and the route with it; then the new ones come."""
    for before in node.namespace.json("-4", "addr", "show", "dev", "up0")[0]["addr_info"]:
        node.namespace.ip("addr", "del", f"{before['local']}/{before['prefixlen']}", "dev", "up0")
    node.namespace.ip("addr", "add", f"{address}/24", "dev", "up0")
    node.namespace.ip("route", "add", "default", "via", HUB)


@pytest.mark.root
def test_what_others_take_from_the_bridge_is_put_back(pair: Pair) -> None:
    node = pair.two
    whole, gateway = node.namespace.state(), node.api.attachments()[0]["gateway_v4"]
    before = counted(node)["repaired"]
    node.namespace.ip("addr", "del", f"{gateway}/26", "dev", BRIDGE)
    until(lambda: node.namespace.state() == whole, "the bridge's address is back")
    node.namespace.ip("route", "del", "10.16.0.0/12", "dev", TUN)
    until(lambda: node.namespace.state() == whole, "the route into the overlay is back")
    assert ping(pair.client, gateway)
    until(lambda: counted(node)["repaired"] >= before + 2, "both are counted")
    assert counted(node)["last_error"] == ""
    assert pair.is_up(CLIENTS)


@pytest.mark.root
def test_an_impaired_container_is_named_and_stays_announced(pair: Pair) -> None:
    node = pair.two
    (attached,) = node.api.attachments()
    pair.client.ip("link", "set", attached["interface"], "down")
    until(lambda: counted(node)["impaired_now"] == [f"{CLIENTS}.0"], "its link is down")
    assert pair.is_up(CLIENTS)
    pair.client.ip("link", "set", attached["interface"], "up")
    until(lambda: counted(node)["impaired_now"] == [], "its link is up")
    pair.client.ip("route", "replace", "default", "via", attached["gateway_v4"])
    assert ping(pair.client, attached["gateway_v4"])


class Obstinate:
    """An environment that refuses some repairs."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.calls = 0

    @property
    def wanted(self) -> Any:
        """What a watcher asks for."""
        return self

    bridge, tun = BRIDGE, TUN

    async def converge(self) -> None:
        """Refuses, until it has refused often enough."""
        self.calls += 1
        if self.calls <= self.refusals:
            raise EnvironmentError_("the link is busy")


def test_a_repair_that_fails_is_tried_again_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "RETRY_FIRST_S", 0.001)

    async def main() -> None:
        environment = Obstinate(3)
        subject = Upkeep(cast("EnvironmentManager", environment), _never, _never)
        subject._on_damaged()
        async with asyncio.timeout(5):
            while subject.counters["repaired"] == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert (environment.calls, subject.counters["repairs_failed"], subject.last_error) == (4, 3, "")
        await subject.stop()

    asyncio.run(main())


def test_damage_during_a_repair_is_looked_at_afterwards() -> None:
    async def main() -> None:
        environment = Obstinate(0)
        subject = Upkeep(cast("EnvironmentManager", environment), _never, _never)
        for _ in range(3):
            subject._on_damaged()
        await asyncio.sleep(0)
        subject._on_damaged()
        for _ in range(5):
            await asyncio.sleep(0)
        assert environment.calls == 2
        await subject.stop()

    asyncio.run(main())


async def _never(*_: object) -> None:
    raise AssertionError("nobody asked for this")
