"""What fails is tried again by itself, by one timer: the node's rules, and ports that somebody has."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance import config
from appliance.cluster.feed import Tables
from appliance.environment import nft
from appliance.environment.errors import EnvironmentError_
from appliance.supervisor import ingress, ports
from appliance.supervisor.ingress import Ingress
from appliance.supervisor.ports import Ports
from tests.supervisor.test_ingress import job


class Kernel:
    """``nft`` of a node, which refuses as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuses = False
        self.table: str | None = None
        self.withdrawn = 0
        for name in ("apply", "ruleset", "described"):
            monkeypatch.setattr(nft, name, getattr(self, name))
        monkeypatch.setattr(nft, "table", self.listed)
        monkeypatch.setattr(ports, "_withdraw", self.withdraw)
        monkeypatch.setattr(ports, "AGAIN_S", 0.01)

    def _check(self) -> None:
        if self.refuses:
            raise EnvironmentError_("nft: refuses")

    async def apply(self, script: str) -> None:
        self._check()
        self.table = script

    async def listed(self, _name: str) -> str | None:
        self._check()
        return self.table

    async def described(self, _name: str) -> dict[str, Any]:
        self._check()
        return {}

    async def ruleset(self) -> dict[str, Any]:
        self._check()
        return {}

    async def withdraw(self) -> int:
        self._check()
        self.withdrawn += 1
        return 0


def make() -> Ports:
    environment: Any = SimpleNamespace(subnets=(), attachments=list, attachment=lambda _: None)
    return Ports(config.Config(), environment)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def other(**firewall: Any) -> config.Config:
    return config.from_data({"firewall": firewall}, "test")


@pytest.mark.root
def test_rules_that_were_refused_are_made_when_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)

    async def main() -> None:
        it = make()
        kernel.refuses = True
        await it.start()
        assert not it.status()["in_force"]
        kernel.refuses = False
        await until(lambda: it.status()["in_force"])
        kernel.refuses = True
        await it.reconfigure(other(accept=False))
        assert (it.last_error, kernel.withdrawn) == ("nft: refuses", 0)
        kernel.refuses = False
        await until(lambda: it.status()["in_force"])
        await until(lambda: kernel.withdrawn)
        await it.reconfigure(other(accept=False, egress=False))
        await it.stop()
        assert kernel.withdrawn == 1, "once, for the change"

    asyncio.run(main())


def test_a_reload_before_the_start_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    asyncio.run(make().reconfigure(other(accept=False)))
    assert (kernel.table, kernel.withdrawn) == (None, 0)


def test_a_port_that_somebody_has_is_tried_again_by_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "AGAIN_S", 1000.0)
    updates = 0

    async def expose(*_: object, **__: object) -> dict[tuple[str, int], str]:
        nonlocal updates
        updates += 1
        return {("tcp", 8080): "somebody listens on it"}

    async def main() -> None:
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []
        later = loop.call_later

        def call_later(delay: float, *rest: Any) -> asyncio.TimerHandle:
            timers.append(later(delay, *rest))
            return timers[-1]

        monkeypatch.setattr(loop, "call_later", call_later)
        known = {"app.ns.web.test": job({"port": 8080})}
        parts: Any = (
            SimpleNamespace(attachments=list),
            SimpleNamespace(identity=None, member=None),
            SimpleNamespace(jobs=known),
            SimpleNamespace(hosts={}),
            SimpleNamespace(ingress=(), expose=expose),
        )
        it = Ingress(*parts)
        it.start()
        for count in (1, 2, 3):
            await until(lambda count=count: updates >= count)  # type: ignore[misc]
            it.changed(Tables(known, frozenset(known)))
        await it.stop()
        assert len(timers) >= 3
        assert all(timer.cancelled() for timer in timers if timer.when() > loop.time() + 500)

    asyncio.run(main())


def test_a_program_that_nobody_waits_for_any_more_is_ended(tmp_path: Path) -> None:
    said = tmp_path / "pid"

    async def main() -> None:
        script = f"echo $$ > {said}.new; mv {said}.new {said}; exec sleep 1000"
        running = asyncio.ensure_future(nft._run("sh", "-c", script))
        await until(said.exists)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
    assert not Path(f"/proc/{said.read_text().strip()}").exists()
