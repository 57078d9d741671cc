"""The watcher in a real kernel, on the loop that the supervisor has. `ip` is the somebody else."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from appliance.environment import EnvironmentManager, NetnsRef
from appliance.environment.watch import Callbacks, Watcher
from tests.environment.netns import BRIDGE, TUN, Netns, command
from tests.environment.settings import SERVICE, attach, config, converged

pytestmark = pytest.mark.root

MakeNetns = Callable[[], Netns]

IN_TIME_S = 2.0
"""An idle machine needs 0.02 s, and 0.12 s where the watcher waits for more; the tests' machine is busy."""
QUIET_S = 0.3
"""More than any delay that a report may have here."""


class Ear:
    """What was reported, in order: `gone 0`, `damaged`, …"""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self._news = asyncio.Event()

    def callbacks(self) -> Callbacks:
        """Those that write it down."""
        return Callbacks(
            gone=lambda it: self._hear(f"gone {it.instance}"),
            impaired=lambda it: self._hear(f"impaired {it.instance}"),
            restored=lambda it: self._hear(f"restored {it.instance}"),
            damaged=lambda: self._hear("damaged"),
            uplink_changed=lambda: self._hear("uplink"),
        )

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        self._news.set()

    async def expect(self, *reports: str) -> None:
        """These, each once, in time, in any order, and then nothing more."""
        async with asyncio.timeout(IN_TIME_S):
            while len(self.heard) < len(reports):
                self._news.clear()
                await self._news.wait()
        await asyncio.sleep(QUIET_S)
        assert sorted(self.heard) == sorted(reports)
        self.heard.clear()

    async def nothing(self) -> None:
        """Silence."""
        await self.expect()


@asynccontextmanager
async def watched(manager: EnvironmentManager, **options: Any) -> AsyncIterator[tuple[Ear, Watcher]]:
    """A watcher that has told what there is to tell at the start."""
    ear = Ear()
    watcher = Watcher(manager, ear.callbacks(), **options)
    await watcher.start()
    try:
        await ear.expect("uplink")
        yield ear, watcher
    finally:
        await watcher.stop()


def on_node(node: Netns, main: Callable[[], Awaitable[None]]) -> None:
    """Runs as the supervisor does: in the node's namespace, on uvloop."""

    async def run() -> None:
        await main()

    node.run(run, uvloop.new_event_loop)


async def change(namespace: Netns, *arguments: str) -> None:
    """Somebody else changes something."""
    await asyncio.to_thread(namespace.ip, *arguments)


# --- Containers ---------------------------------------------------------------------------------


def test_a_namespace_is_deleted(node: Netns, make_netns: MakeNetns) -> None:
    stays, goes = make_netns(), make_netns()

    async def main() -> None:
        manager = await converged()
        kept = await attach(manager, stays)
        await attach(manager, goes, 1)
        async with watched(manager) as (ear, _):
            await asyncio.to_thread(command, "ip", "netns", "del", goes.name)
            await ear.expect("gone 1")
            assert manager.attachments() == [kept]

    on_node(node, main)


def test_a_link_is_deleted_from_inside(node: Netns, container: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        async with watched(manager) as (ear, _):
            attachment = await attach(manager, container)
            await change(container, "link", "del", attachment.interface)
            await ear.expect("gone 0")

            again = await attach(manager, container)
            await change(node, "link", "del", again.veth)
            await ear.expect("gone 0")

    on_node(node, main)


def test_the_process_that_holds_an_unnamed_namespace_is_killed(node: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        start = "echo; exec sleep 60"
        sleeper = await asyncio.create_subprocess_exec(
            "unshare", "--net", "sh", "-c", start, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert sleeper.stdout is not None
            await sleeper.stdout.readline()  # it is in its namespace now
            async with watched(manager) as (ear, _):
                await manager.attach(SERVICE, 0, NetnsRef.by_pid(sleeper.pid))
                await ear.nothing()
                sleeper.kill()
                await ear.expect("gone 0")
        finally:
            if sleeper.returncode is None:
                sleeper.kill()
            await sleeper.wait()

    on_node(node, main)


def test_a_container_switches_its_end_off_and_on(node: Netns, container: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        async with watched(manager) as (ear, _):
            attachment = await attach(manager, container)
            await change(container, "link", "set", attachment.interface, "down")
            await ear.expect("impaired 0")
            await change(container, "link", "set", attachment.interface, "up")
            await ear.expect("restored 0")

    on_node(node, main)


def test_a_container_s_end_is_moved_away(node: Netns, make_netns: MakeNetns) -> None:
    container, elsewhere = make_netns(), make_netns()

    async def main() -> None:
        manager = await converged()
        async with watched(manager) as (ear, _):
            attachment = await attach(manager, container)
            await change(container, "link", "set", attachment.interface, "netns", elsewhere.name)
            await ear.expect("impaired 0")

    on_node(node, main)


def test_many_containers_end_at_once(node: Netns, make_netns: MakeNetns) -> None:
    containers = [make_netns() for _ in range(12)]

    async def main() -> None:
        manager = await converged()
        async with watched(manager) as (ear, _):
            await asyncio.gather(*(attach(manager, it, number) for number, it in enumerate(containers)))
            await ear.nothing()
            for it in containers:
                await asyncio.to_thread(command, "ip", "netns", "del", it.name)
            await ear.expect(*(f"gone {number}" for number in range(len(containers))))

    on_node(node, main)


# --- The node -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        ["link", "set", BRIDGE, "down"],
        ["addr", "del", "10.18.0.1/26", "dev", BRIDGE],
        ["link", "set", TUN, "down"],
        ["route", "del", "10.16.0.0/12"],
        ["route", "add", "10.64.0.0/12", "dev", TUN, "proto", "234"],
    ],
    ids=" ".join,
)
def test_damage_is_reported_once_and_its_repair_is_not(node: Netns, container: Netns, damage: list[str]) -> None:
    async def main() -> None:
        manager = await converged()
        await attach(manager, container)
        async with watched(manager) as (ear, _):
            whole = node.state()
            await change(node, *damage)
            await ear.expect("damaged")
            await manager.converge()
            await ear.nothing()
            assert node.state() == whole

    on_node(node, main)


def test_a_port_is_taken_off_the_bridge(node: Netns, container: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        attachment = await attach(manager, container)
        async with watched(manager) as (ear, _):
            await change(node, "link", "set", attachment.veth, "nomaster")
            await ear.expect("damaged")

    on_node(node, main)


def test_the_bridge_is_deleted(node: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        async with watched(manager) as (ear, _):
            await change(node, "link", "del", BRIDGE)
            await ear.expect("damaged")
            await manager.converge()
            await ear.nothing()

    on_node(node, main)


def test_damage_that_cannot_be_repaired_is_reported(node: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        async with watched(manager) as (ear, _):
            await change(node, "link", "del", TUN)
            await ear.expect("damaged")

    on_node(node, main)


def test_what_we_do_ourselves_is_not_reported(node: Netns, make_netns: MakeNetns) -> None:
    one, other = make_netns(), make_netns()

    async def main() -> None:
        manager = EnvironmentManager(config())
        async with watched(manager) as (ear, _):
            await manager.converge()
            await attach(manager, one)
            await attach(manager, other, 1)
            await attach(manager, other)  # moves
            await manager.converge()
            await manager.detach(SERVICE, 1)
            await manager.remove()
            await ear.nothing()

    on_node(node, main)


def test_who_undoes_a_repair_at_once_is_not_fought_at_that_speed(node: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        ear = Ear()
        callbacks = ear.callbacks()
        watcher = Watcher(manager, callbacks)
        await watcher.start()
        try:
            started = time.monotonic()
            while time.monotonic() - started < 1.5:
                await change(node, "route", "del", "10.16.0.0/12")
                await manager.converge()
                await change(node, "route", "del", "10.16.0.0/12")
                await asyncio.sleep(0.05)
                await manager.converge()
        finally:
            await watcher.stop()
        assert 1 <= ear.heard.count("damaged") <= 5

    on_node(node, main)


# --- The uplink ---------------------------------------------------------------------------------


def add_uplink(node: Netns) -> None:
    """A link to elsewhere, whose other end happens to be here too."""
    node.ip("link", "add", "uplink", "type", "veth", "peer", "name", "elsewhere")
    node.ip("link", "set", "elsewhere", "up")
    node.ip("link", "set", "uplink", "up")
    node.ip("addr", "add", "192.0.2.1/24", "dev", "uplink")


def test_the_uplink_s_address_changes(node: Netns) -> None:
    add_uplink(node)

    async def main() -> None:
        async with watched(await converged()) as (ear, _):
            await change(node, "addr", "add", "192.0.2.2/24", "dev", "uplink")
            await ear.expect("uplink")
            await change(node, "addr", "flush", "dev", "uplink")
            await ear.expect("uplink")
            await change(node, "link", "set", "uplink", "down")
            await ear.expect("uplink")

    on_node(node, main)


def test_the_default_route_changes(node: Netns) -> None:
    add_uplink(node)

    async def main() -> None:
        async with watched(await converged()) as (ear, _):
            await change(node, "route", "add", "default", "via", "192.0.2.254")
            await ear.expect("uplink")
            await change(node, "-6", "route", "add", "2001:db8::/32", "dev", "uplink")
            await ear.expect("uplink")

    on_node(node, main)


# --- Lost events, start and stop ----------------------------------------------------------------


def test_what_happened_while_events_were_lost_is_found(node: Netns, make_netns: MakeNetns) -> None:
    containers = [make_netns() for _ in range(3)]

    async def main() -> None:
        manager = await converged()
        made = [await attach(manager, it, number) for number, it in enumerate(containers)]
        async with watched(manager, receive_buffer=4096) as (ear, watcher):
            node.ip("route", "del", "10.16.0.0/12")  # not in a thread: the loop reads nothing meanwhile
            for number in range(40):
                node.ip("link", "set", BRIDGE, "alias", f"noise {number}")
            containers[0].ip("link", "del", made[0].interface)
            containers[1].ip("link", "set", made[1].interface, "down")
            await ear.expect("gone 0", "impaired 1", "damaged", "uplink")
            assert watcher.overruns > 0
            assert [it.instance for it in manager.attachments()] == [1, 2]

    on_node(node, main)


def test_what_happened_before_the_start_is_reported(node: Netns, make_netns: MakeNetns) -> None:
    gone, down = make_netns(), make_netns()

    async def main() -> None:
        manager, ear = await converged(), Ear()
        await attach(manager, gone)
        attachment = await attach(manager, down, 1)
        await change(down, "link", "set", attachment.interface, "down")
        await change(gone, "link", "del", attachment.interface)
        await change(node, "route", "del", "10.16.0.0/12")
        watcher = Watcher(manager, ear.callbacks())
        await watcher.start()
        try:
            await ear.expect("gone 0", "impaired 1", "damaged", "uplink")
        finally:
            await watcher.stop()

    on_node(node, main)


def test_converge_reports_what_it_finds_gone(node: Netns, container: Netns) -> None:
    async def main() -> None:
        manager = await converged()
        async with watched(manager) as (ear, _):
            attachment = await attach(manager, container)
            container.ip("link", "del", attachment.interface)
            await manager.converge()
            await ear.expect("gone 0")

    on_node(node, main)


def test_nothing_is_reported_after_the_stop(node: Netns, container: Netns) -> None:
    async def main() -> None:
        manager, ear = await converged(), Ear()
        attachment = await attach(manager, container)
        watcher = Watcher(manager, ear.callbacks())
        await watcher.start()
        await ear.expect("uplink")
        await change(node, "route", "del", "10.16.0.0/12")
        await watcher.stop()
        await watcher.stop()
        await change(container, "link", "del", attachment.interface)
        assert await manager.forget_link(attachment.veth) == attachment
        assert await manager.forget_link(attachment.veth) is None
        await ear.nothing()

    on_node(node, main)


def test_a_callback_that_fails_is_no_end(node: Netns, container: Netns, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        manager, ear = await converged(), Ear()
        watcher = Watcher(manager, Callbacks(_fail, _fail, _fail, _fail, ear.callbacks().uplink_changed))
        await watcher.start()
        try:
            await ear.expect("uplink")
            attachment = await attach(manager, container)
            await change(container, "link", "del", attachment.interface)
            await asyncio.sleep(QUIET_S)
            assert manager.attachments() == []
            await change(node, "addr", "add", "192.0.2.1/32", "dev", "lo")
            await ear.expect("uplink")
        finally:
            await watcher.stop()

    on_node(node, main)
    assert "a callback of the watcher failed" in caplog.text


def _fail(*_: object) -> None:
    raise ValueError("on purpose")
