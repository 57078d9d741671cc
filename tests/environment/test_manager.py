"""The manager in a real kernel. `ip` and `ethtool` tell what came of it."""

import asyncio
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
import uvloop

from appliance.environment import (
    AddressesExhausted,
    Attachment,
    EnvironmentError_,
    EnvironmentManager,
    NetnsRef,
)
from appliance.environment.addresses import REST_S
from appliance.environment.plan import Command, SetRecord
from tests.environment.netns import BRIDGE, TUN, Netns
from tests.environment.settings import SERVICE, attach, config, converged

pytestmark = pytest.mark.root

MakeNetns = Callable[[], Netns]

ATTACHED_IN_TURN = 20
SIOCGIFFLAGS = 0x8913
IFF_RUNNING = 0x40


def addresses(namespace: Netns, link: str) -> set[str]:
    """A link's addresses but link-local ones."""
    (found,) = namespace.json("addr", "show", "dev", link)
    return {f"{it['local']}/{it['prefixlen']}" for it in found["addr_info"] if it["scope"] == "global"}


# --- The node -----------------------------------------------------------------------------------


def test_converge_makes_the_node(node: Netns) -> None:
    node.run(converged)
    (bridge,), (tun,) = node.json("link", "show", BRIDGE), node.json("link", "show", TUN)
    assert bridge["linkinfo"]["info_kind"] == "bridge"
    assert (bridge["mtu"], tun["mtu"], tun["txqlen"]) == (1450, 1450, 1000)
    assert "UP" in bridge["flags"]
    assert "UP" in tun["flags"]
    assert addresses(node, BRIDGE) == {"10.18.0.1/26", "fc00::1/120"}
    assert addresses(node, TUN) == {"10.18.0.1/32"}
    routes = node.json("-4", "route") + node.json("-6", "route")
    into_tun = {it["dst"] for it in routes if it["dev"] == TUN}
    assert into_tun == {"10.16.0.0/12", "fc00::/7"}


def test_converge_twice_changes_nothing(node: Netns) -> None:
    done: list[Command] = []

    async def main() -> None:
        manager = await converged()
        manager.fault_point = done.append
        await manager.converge()

    node.run(main)
    assert done == []


@pytest.mark.parametrize(
    "damage",
    [
        ["link", "del", BRIDGE],
        ["link", "set", BRIDGE, "down"],
        ["link", "set", BRIDGE, "mtu", "1400"],
        ["addr", "del", "10.18.0.1/26", "dev", BRIDGE],
        ["addr", "add", "10.18.7.7/24", "dev", BRIDGE],
        ["link", "set", TUN, "down"],
        ["addr", "del", "10.18.0.1/32", "dev", TUN],
        ["link", "set", TUN, "txqueuelen", "500"],
        ["route", "del", "10.16.0.0/12"],
        ["-6", "route", "del", "fc00::/7"],
        ["route", "add", "10.64.0.0/12", "dev", TUN, "proto", "234"],
    ],
    ids=" ".join,
)
def test_converge_repairs(node: Netns, container: Netns, damage: list[str]) -> None:
    async def main() -> None:
        manager = await converged()
        await attach(manager, container)
        whole = node.state()
        node.ip(*damage)
        await manager.converge()
        assert node.state() == whole
        assert [link["ifname"] for link in node.json("link", "show", "master", BRIDGE)]

    node.run(main)


def test_forwarding_is_on_and_router_advertisements_still_count(node: Netns) -> None:
    node.ip("link", "add", "uplink", "type", "bridge")
    node.set_sysctl("net/ipv6/conf/uplink/accept_ra", "1")
    node.run(converged)
    assert node.sysctl("net/ipv4/ip_forward") == "1"
    assert node.sysctl("net/ipv6/conf/all/forwarding") == "1"
    assert node.sysctl("net/ipv6/conf/uplink/accept_ra") == "2"


def test_strict_filtering_elsewhere_is_left_alone(node: Netns) -> None:
    node.set_sysctl("net/ipv4/conf/all/rp_filter", "1")
    node.run(converged)
    assert node.sysctl("net/ipv4/conf/all/rp_filter") == "1"
    assert node.sysctl(f"net/ipv4/conf/{TUN}/rp_filter") == "2"


def test_converge_needs_the_tun_link(node: Netns) -> None:
    node.ip("link", "del", TUN)
    with pytest.raises(EnvironmentError_, match=r"network\.tun: expected the TUN link edge-tun0, got none"):
        node.run(converged)


def test_converge_does_not_take_over_another_kind_of_link(node: Netns) -> None:
    node.ip("link", "add", BRIDGE, "type", "veth")
    with pytest.raises(EnvironmentError_, match=r"network\.bridge: expected edge-br0 to be a bridge, got a veth"):
        node.run(converged)


def test_remove_leaves_nothing(node: Netns, container: Netns) -> None:
    before = node.state(), container.state()

    async def main() -> None:
        manager = await converged()
        await attach(manager, container)
        await manager.remove()
        assert manager.attachments() == []
        await manager.remove()

    node.run(main)
    node.ip("link", "set", TUN, "down")
    assert (node.state(), container.state()) == before


def test_remove_leaves_what_others_made(node: Netns) -> None:
    node.ip("link", "add", BRIDGE, "type", "bridge")
    node.ip("addr", "add", "192.0.2.1/24", "dev", BRIDGE)
    node.ip("link", "add", "ea0123456789", "type", "bridge")
    node.ip("link", "add", "ea00000000aa", "type", "veth", "peer", "name", "other")

    async def main() -> None:
        manager = await converged()
        await manager.remove()

    node.run(main)
    assert addresses(node, BRIDGE) == {"192.0.2.1/24"}
    assert {"ea0123456789", "ea00000000aa", "other"} <= set(node.state()["links"])


def test_two_appliances_in_one_namespace(node: Netns, container: Netns, make_netns: MakeNetns) -> None:
    """What is on the other one's bridge is not taken for a leftover."""
    node.ip("tuntap", "add", "dev", "tun-b", "mode", "tun")
    other = make_netns()
    ranges = {"overlay": ["10.64.0.0/12"], "services": [], "subnet_v4": "10.64.0.0/26", "subnet_v6": ""}

    async def main() -> None:
        first, second = await converged(), await converged(bridge="br-b", tun="tun-b", **ranges)
        await attach(first, container)
        await second.attach("x.x.x.x", 0, NetnsRef.by_name(other.name))
        again = await converged()
        assert len(again.attachments()) == 1
        await again.remove()

    node.run(main)
    assert addresses(other, "eth0") == {"10.64.0.2/26"}


def test_the_bridges_hardware_address_never_changes(node: Netns, container: Netns) -> None:
    """A bridge without one of its own follows its ports, and containers' neighbour caches go stale."""

    def mac() -> str:
        return str(node.json("link", "show", BRIDGE)[0]["address"])

    async def main() -> set[str]:
        manager = await converged()
        macs = {mac()}
        await attach(manager, container)
        macs.add(mac())
        node.ip("link", "del", BRIDGE)
        await manager.converge()
        macs.add(mac())
        await manager.detach(SERVICE, 0)
        return macs | {mac()}

    assert len(node.run(main)) == 1


# --- A container --------------------------------------------------------------------------------


def test_attach_tells_what_it_made(node: Netns, container: Netns) -> None:
    async def main() -> tuple[Attachment, list[Attachment]]:
        manager = await converged()
        return await attach(manager, container), manager.attachments()

    attachment, listed = node.run(main)
    assert attachment == Attachment(
        service=SERVICE,
        instance=0,
        interface="eth0",
        address_v4=IPv4Address("10.18.0.2"),
        address_v6=IPv6Address("fc00::2"),
        gateway_v4=IPv4Address("10.18.0.1"),
        gateway_v6=IPv6Address("fc00::1"),
        netns=NetnsRef.by_name(container.name),
    )
    assert listed == [attachment]
    assert addresses(container, "eth0") == {"10.18.0.2/26", "fc00::2/120"}
    (link,) = container.json("link", "show", "eth0")
    assert (link["mtu"], link["address"]) == (1450, "02:ea:0a:12:00:02")
    (v4,) = container.json("-4", "route", "show", "default")
    (v6,) = container.json("-6", "route", "show", "default")
    assert (v4["gateway"], v6["gateway"]) == ("10.18.0.1", "fc00::1")


def test_the_nodes_end_receives_with_gro_and_has_no_addresses(node: Netns, container: Netns) -> None:
    async def main() -> str:
        return (await attach(await converged(), container)).veth

    veth = node.run(main)
    assert "generic-receive-offload: on" in node.command("ethtool", "-k", veth)
    (link,) = node.json("addr", "show", "dev", veth)
    assert (link["mtu"], link["master"], link["addr_info"]) == (1450, BRIDGE, [])


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_one_family_alone(node: Netns, container: Netns, family: str) -> None:
    other = {"v4": {"subnet_v6": ""}, "v6": {"subnet_v4": ""}}[family]

    async def main() -> Attachment:
        return await attach(await converged(**other), container)

    attachment = node.run(main)
    has = {"v4": attachment.address_v4 is not None, "v6": attachment.address_v6 is not None}
    assert has == {"v4": family == "v4", "v6": family == "v6"}
    assert len(addresses(container, "eth0")) == 1


def test_a_container_that_refuses_ipv6_by_default_has_it_here(node: Netns, container: Netns) -> None:
    container.set_sysctl("net/ipv6/conf/default/disable_ipv6", "1")

    async def main() -> None:
        await attach(await converged(), container)

    node.run(main)
    assert addresses(container, "eth0") == {"10.18.0.2/26", "fc00::2/120"}


def test_no_address_waits_for_duplicate_address_detection(node: Netns, container: Netns) -> None:
    """Nor where an administrator wants it on every link, but for the link-local one there."""
    for namespace in (node, container):
        namespace.set_sysctl("net/ipv6/conf/all/accept_dad", "1")

    async def main() -> list[dict[str, Any]]:
        await attach(await converged(), container)
        return container.json("-6", "addr") + node.json("-6", "addr", "show", "dev", BRIDGE)

    found = [it for link in node.run(main) for it in link["addr_info"] if it["scope"] == "global"]
    assert {it["local"] for it in found} == {"fc00::1", "fc00::2"}
    assert not [it for it in found if it.get("tentative")]


def test_the_link_local_address_is_there_at_once(node: Netns, container: Netns) -> None:
    async def main() -> list[dict[str, Any]]:
        await attach(await converged(), container)
        return container.json("-6", "addr", "show", "dev", "eth0")

    (link,) = node.run(main)
    (address,) = [it for it in link["addr_info"] if it["scope"] == "link"]
    assert not address.get("tentative")


def test_an_attached_container_can_be_called_at_once(node: Netns, container: Netns) -> None:
    """A link's carrier comes into force some time after both ends are up, later if the kernel has much to do with
    links. Whoever called the container meanwhile would lose its first packet, and a second."""
    running = []

    def note(command: Command) -> None:
        if isinstance(command, SetRecord):
            running.append(is_running(command.link))

    async def main() -> None:
        manager = await converged()
        manager.fault_point = note
        for number in range(ATTACHED_IN_TURN):
            await attach(manager, container, number)
            await manager.detach(SERVICE, number)

    with busy_links(node):
        node.run(main)
    assert running == [True] * ATTACHED_IN_TURN


def is_running(link: str) -> bool:
    """Whether the carrier is in force. Asked over netlink for one link, the kernel would see to it first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh22x", link.encode(), 0))
    return bool(struct.unpack("16sh22x", answer)[1] & IFF_RUNNING)


@contextmanager
def busy_links(node: Netns) -> Iterator[None]:
    """Other links come and go, in this namespace, while the block runs."""
    done = threading.Event()

    def come_and_go(name: str) -> None:
        while not done.is_set():
            for verb in (["add", name, "type", "veth", "peer", f"{name}p"], ["set", name, "up"], ["del", name]):
                node.ip("link", *verb)

    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(come_and_go, f"busy{number}") for number in range(3)]
        try:
            yield
        finally:
            done.set()
        for task in tasks:
            task.result()


def test_attach_by_pid_and_by_path(node: Netns, make_netns: MakeNetns) -> None:
    by_path, by_pid = make_netns(), make_netns()

    async def main(pid: int) -> None:
        manager = await converged()
        await manager.attach(SERVICE, 1, NetnsRef.by_path(f"/run/netns/{by_path.name}"))
        await manager.attach(SERVICE, 2, NetnsRef.by_pid(pid))

    with by_pid.process() as pid:
        node.run(lambda: main(pid))
    assert addresses(by_path, "eth0") == {"10.18.0.2/26", "fc00::2/120"}
    assert addresses(by_pid, "eth0") == {"10.18.0.3/26", "fc00::3/120"}


def test_attach_again_changes_nothing(node: Netns, container: Netns) -> None:
    done: list[Command] = []

    async def main() -> None:
        manager = await converged()
        first = await attach(manager, container)
        manager.fault_point = done.append
        assert await attach(manager, container) == first

    node.run(main)
    assert done == []


@pytest.mark.parametrize(
    "damage",
    [
        ["link", "set", "eth0", "down"],
        ["link", "set", "eth0", "mtu", "1400"],
        ["addr", "flush", "dev", "eth0", "scope", "global"],
        ["route", "del", "default"],
        ["-6", "route", "del", "default"],
        ["link", "del", "eth0"],
    ],
    ids=" ".join,
)
def test_attach_again_repairs(node: Netns, container: Netns, damage: list[str]) -> None:
    async def main() -> None:
        manager = await converged()
        first = await attach(manager, container)
        whole = node.state(), container.state()
        container.ip(*damage)
        assert await attach(manager, container) == first
        assert (node.state(), container.state()) == whole
        (link,) = container.json("link", "show", "eth0")
        assert link["mtu"] == 1450

    node.run(main)


def test_an_instance_moves_to_another_container_with_its_addresses(
    node: Netns, container: Netns, make_netns: MakeNetns
) -> None:
    other = make_netns()

    async def main() -> None:
        manager = await converged()
        first = await attach(manager, container)
        second = await attach(manager, other)
        assert (second.address_v4, second.address_v6) == (first.address_v4, first.address_v6)

    node.run(main)
    assert container.state()["links"] == ["lo"]
    assert addresses(other, "eth0") == {"10.18.0.2/26", "fc00::2/120"}


def test_a_link_to_another_node_is_not_taken_for_ours(node: Netns, container: Netns, make_netns: MakeNetns) -> None:
    """All indices are alike: those of the links on both nodes, and those in both containers."""
    other_node, other = make_netns(), make_netns()
    other_node.ip("tuntap", "add", "dev", TUN, "mode", "tun")

    async def first(to: Netns) -> Attachment:
        return await attach(await converged(), to)

    node.run(lambda: first(container))
    other_node.run(lambda: first(other))
    (here,), (there,) = container.json("link", "show", "eth0"), other.json("link", "show", "eth0")
    assert (here["ifindex"], here["link_index"]) == (there["ifindex"], there["link_index"])
    assert node.run(lambda: first(other)).interface == "eth1"


def test_a_wrong_interface_name_costs_no_attachment(node: Netns, container: Netns, make_netns: MakeNetns) -> None:
    """Neither where it is attached by another name, nor where it would move to and the name is taken."""
    other = make_netns()
    other.ip("link", "add", "eth7", "type", "bridge")

    async def main() -> None:
        manager = await converged()
        before = await attach(manager, container)
        for where, wanted in ((container, "eth7"), (other, "eth7")):
            with pytest.raises(EnvironmentError_, match="interface: expected"):
                await manager.attach(SERVICE, 0, NetnsRef.by_name(where.name), wanted)
            assert manager.attachments() == [before]
            assert addresses(container, "eth0") == {"10.18.0.2/26", "fc00::2/120"}
        await manager.converge()
        assert manager.attachments() == [before]
        assert await attach(manager, container) == before
        assert len(node.json("link", "show", "master", BRIDGE)) == 1
        with pytest.raises(EnvironmentError_, match="interface: expected"):
            await manager.attach(SERVICE, 1, NetnsRef.by_name(other.name), "eth7")
        assert manager.attachments() == [before], "one that is new is not there, and its addresses are free"
        assert (await attach(manager, other, 1)).address_v4 == before.address_v4 + 1  # type: ignore[operator]

    node.run(main)


def test_a_container_with_a_network_of_its_own_gets_only_the_overlay(node: Netns, container: Netns) -> None:
    container.ip("link", "add", "eth0", "type", "bridge")
    container.ip("addr", "add", "192.0.2.2/24", "dev", "eth0")
    container.ip("link", "set", "eth0", "up")
    container.ip("route", "add", "default", "via", "192.0.2.1")

    async def main() -> Attachment:
        return await attach(await converged(), container)

    assert node.run(main).interface == "eth1"
    routes = container.json("-4", "route")
    assert [it["gateway"] for it in routes if it["dst"] == "default"] == ["192.0.2.1"]
    assert [it["dev"] for it in routes if it["dst"] == "10.16.0.0/12"] == ["eth1"]
    (v6,) = container.json("-6", "route", "show", "default")
    assert v6["dev"] == "eth1"


def test_detach_leaves_nothing(node: Netns, container: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        before = node.state(), container.state()
        await attach(manager, container)
        assert await manager.detach(SERVICE, 0)
        assert (node.state(), container.state()) == before
        assert not await manager.detach(SERVICE, 0)
        (bridge,) = node.json("link", "show", BRIDGE)
        assert bridge["mtu"] == 1450, "the bridge's MTU follows its ports unless it was set"

    node.run(main)


def test_a_freed_address_rests(node: Netns, container: Netns) -> None:
    now = 1000.0

    async def main() -> list[str]:
        nonlocal now
        manager = EnvironmentManager(config(), clock=lambda: now)
        await manager.converge()
        given = []
        for wait in (0.0, REST_S - 1, 1.0):
            now += wait
            given.append(str((await attach(manager, container)).address_v4))
            await manager.detach(SERVICE, 0)
        return given

    assert node.run(main) == ["10.18.0.2", "10.18.0.3", "10.18.0.2"]


def test_addresses_run_out(node: Netns, container: Netns, make_netns: MakeNetns) -> None:
    other = make_netns()

    async def main() -> None:
        manager = await converged(subnet_v4="10.18.0.0/30")
        await attach(manager, container)
        with pytest.raises(AddressesExhausted, match=r"10\.18\.0\.0/30, got none \(1 in use\)"):
            await attach(manager, other, instance=1)
        await manager.detach(SERVICE, 0)

    node.run(main)
    assert other.state()["links"] == ["lo"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (NetnsRef.by_name("eatest-none"), "netns: .* at /run/netns/eatest-none, got: No such file"),
        (
            NetnsRef.by_path("/etc/hostname"),
            "netns: expected a network namespace at /etc/hostname, got something",
        ),
        (NetnsRef.by_path("/proc/self/ns/uts"), "netns: expected a network namespace .* got something else"),
        (NetnsRef.by_path("/proc/thread-self/ns/net"), "netns: .* of a container, got the node's own"),
        (NetnsRef.by_pid(4194304), "netns: .* at /proc/4194304/ns/net, got: No such file"),
    ],
    ids=str,
)
def test_attach_names_what_is_wrong_with_the_namespace(node: Netns, reference: NetnsRef, message: str) -> None:
    async def main() -> None:
        manager = await converged()
        with pytest.raises(EnvironmentError_, match=message):
            await manager.attach(SERVICE, 0, reference)
        assert manager.attachments() == []

    node.run(main)


def test_attach_before_converge_is_refused(node: Netns, container: Netns) -> None:
    async def main() -> None:
        with pytest.raises(EnvironmentError_, match="converged first"):
            await attach(EnvironmentManager(config()), container)

    node.run(main)


# --- Many at once -------------------------------------------------------------------------------


def test_different_containers_at_once(node: Netns, make_netns: MakeNetns) -> None:
    containers = [make_netns() for _ in range(8)]

    async def main() -> list[Attachment]:
        manager = await converged()
        return await asyncio.gather(*(attach(manager, it, number) for number, it in enumerate(containers)))

    attachments = node.run(main)
    assert len({it.address_v4 for it in attachments}) == len({it.address_v6 for it in attachments}) == 8
    for namespace, attachment in zip(containers, attachments, strict=True):
        assert f"{attachment.address_v4}/26" in addresses(namespace, "eth0")


def test_the_same_container_one_after_the_other(node: Netns, container: Netns) -> None:
    """Two services in one container: the second finds eth0 taken, and a default route."""

    async def main() -> list[Attachment]:
        manager = await converged()
        return await asyncio.gather(*(attach(manager, container, number) for number in range(2)))

    assert {it.interface for it in node.run(main)} == {"eth0", "eth1"}


def test_the_same_attachment_many_times_at_once(node: Netns, container: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        results = await asyncio.gather(*(attach(manager, container) for _ in range(5)))
        assert len(set(results)) == 1
        detached = await asyncio.gather(*(manager.detach(SERVICE, 0) for _ in range(5)))
        assert sorted(detached) == [False] * 4 + [True]

    node.run(main)
    assert container.state()["links"] == ["lo"]


def test_converging_while_attaching_removes_nothing_unfinished(node: Netns, make_netns: MakeNetns) -> None:
    containers = [make_netns() for _ in range(6)]

    async def main() -> None:
        manager = await converged()
        attaching = [attach(manager, it, number) for number, it in enumerate(containers)]
        await asyncio.gather(*attaching, *(manager.converge() for _ in range(6)))
        assert len(manager.attachments()) == len(node.json("link", "show", "master", BRIDGE)) == 6

    node.run(main)


def test_a_cancelled_caller_leaves_an_attachment_that_is_known(node: Netns, container: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        caller = asyncio.ensure_future(attach(manager, container))
        await asyncio.sleep(0.002)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await manager.close()
        assert [it.interface for it in manager.attachments()] == ["eth0"]

    node.run(main)


def test_under_uvloop_whose_transports_refuse_netlink(node: Netns, container: Netns) -> None:
    async def main() -> bool:
        manager = await converged()
        await attach(manager, container)
        return await manager.detach(SERVICE, 0)

    assert node.run(main, loop=uvloop.new_event_loop)


def test_the_loop_goes_on_meanwhile(node: Netns, make_netns: MakeNetns) -> None:
    """Nothing of an operation that waits for the kernel runs in the caller's loop."""
    containers = [make_netns() for _ in range(4)]
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(0)
            longest = max(longest, loop.time() - before)

    async def main() -> set[int]:
        manager = await converged()
        seen: set[int] = set()
        manager.fault_point = lambda _: seen.add(threading.get_ident())
        watcher = asyncio.ensure_future(watch())
        await asyncio.gather(*(attach(manager, it, number) for number, it in enumerate(containers)))
        watcher.cancel()
        return seen - {threading.get_ident()}

    assert len(node.run(main)) == 4
    assert longest < 0.25


def test_no_handle_stays_open(node: Netns, container: Netns) -> None:
    def handles() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    async def main() -> None:
        manager = await converged()
        await attach(manager, container)
        await manager.detach(SERVICE, 0)
        before = handles()
        for _ in range(5):
            await attach(manager, container)
            await manager.converge()
            await manager.detach(SERVICE, 0)
            with pytest.raises(EnvironmentError_):
                await manager.attach(SERVICE, 0, NetnsRef.by_path("/etc/hostname"))
        assert handles() == before

    node.run(main)


# --- After a restart ----------------------------------------------------------------------------


def test_a_new_process_adopts_what_is_there(node: Netns, make_netns: MakeNetns) -> None:
    containers = [make_netns() for _ in range(3)]

    async def main() -> None:
        first = await converged()
        for number, it in enumerate(containers[:2]):
            await attach(first, it, number)
        before = node.state()
        second = await converged()
        assert node.state() == before
        assert second.attachments() == first.attachments()
        third = await attach(second, containers[2], 2)
        assert str(third.address_v4) == "10.18.0.4"
        assert await second.detach(SERVICE, 0)

    node.run(main)


def test_links_of_another_subnet_are_not_adopted(node: Netns, container: Netns) -> None:
    async def main() -> None:
        await attach(await converged(), container)
        manager = await converged(subnet_v4="10.18.1.0/26")
        assert manager.attachments() == []

    node.run(main)
    assert addresses(node, BRIDGE) == {"10.18.1.1/26", "fc00::1/120"}
    assert container.state()["links"] == ["lo"]


def test_a_container_that_is_gone_is_forgotten(node: Netns, container: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        attachment = await attach(manager, container)
        node.ip("link", "del", attachment.veth)
        await manager.converge()
        assert manager.attachments() == []

    node.run(main)


def test_a_failure_while_repairing_leaves_nothing(node: Netns, container: Netns) -> None:
    def fail(command: Command) -> None:
        if isinstance(command, SetRecord):
            raise OSError(5, os.strerror(5))

    async def main() -> None:
        manager = await converged()
        await attach(manager, container)
        container.ip("link", "del", "eth0")
        manager.fault_point = fail
        with pytest.raises(EnvironmentError_, match="Input/output"):
            await attach(manager, container)
        assert manager.attachments() == []

    node.run(main)
    assert container.state()["links"] == ["lo"]
