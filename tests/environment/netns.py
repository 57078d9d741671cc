"""Network namespaces for tests, and an independent look at what is in them (iproute2, not pyroute2)."""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import netns

T = TypeVar("T")

PREFIX = "eatest-"
TUN = "edge-tun0"
BRIDGE = "edge-br0"
RUN = Path("/run/netns")

_numbers = itertools.count()


@dataclass(frozen=True)
class Netns:
    """A namespace of this test process, by its name."""

    name: str

    def ip(self, *arguments: str) -> str:
        """What `ip` prints in here."""
        return command("ip", "-n", self.name, *arguments)

    def json(self, *arguments: str) -> list[dict[str, Any]]:
        """The same as data. iproute2 prints an empty object for what a filter leaves out."""
        return [it for it in json.loads(self.ip("-j", "-d", *arguments) or "[]") if it]

    def command(self, *arguments: str) -> str:
        """What a command prints that runs in here."""
        return command("ip", "netns", "exec", self.name, *arguments)

    def sysctl(self, path: str) -> str:
        """A value below /proc/sys, as somebody in here sees it."""
        return self.call(lambda: (Path("/proc/sys") / path).read_text().strip())

    def set_sysctl(self, path: str, value: str) -> None:
        """Writes a value below /proc/sys."""
        self.call(lambda: (Path("/proc/sys") / path).write_text(value))

    def call(self, function: Callable[[], T]) -> T:
        """The result of a function in a thread that is in here."""

        def inside() -> T:
            netns.setns(str(RUN / self.name), flags=0)
            return function()

        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(inside).result()

    def run(
        self,
        main: Callable[[], Coroutine[Any, Any, T]],
        loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.SelectorEventLoop,
    ) -> T:
        """The result of a coroutine in a thread that is in here, as are the threads that it starts."""

        def inside() -> T:
            with asyncio.Runner(loop_factory=loop) as runner:
                return runner.run(main())

        return self.call(inside)

    @contextmanager
    def process(self) -> Iterator[int]:
        """The number of a process that is in here and does nothing."""
        start = ["ip", "netns", "exec", self.name, "sh", "-c", "echo; read _"]
        with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sleeper:
            assert sleeper.stdout is not None
            sleeper.stdout.readline()  # it is in here now, not only about to be
            yield sleeper.pid

    def state(self) -> dict[str, Any]:
        """Links, addresses and routes: what a leak would show in. What the kernel adds by itself, and the
        loopback link's, is left out."""
        return {
            "links": sorted(link["ifname"] for link in self.json("link")),
            "addresses": self._addresses(),
            "routes": sorted(self._routes("-4") + self._routes("-6")),
        }

    def _addresses(self) -> list[str]:
        return sorted(
            f"{link['ifname']} {it['local']}/{it['prefixlen']}"
            for link in self.json("addr")
            for it in link["addr_info"]
            if link["ifname"] != "lo" and it["scope"] != "link"
        )

    def _routes(self, family: str) -> list[str]:
        routes = self.json(family, "route", "show", "table", "all")
        mine = (it for it in routes if it["dev"] != "lo" and it.get("protocol") != "kernel")
        return [f"{it['dst']} {it.get('gateway')} {it['dev']} {it.get('protocol')}" for it in mine]


def command(*arguments: str) -> str:
    """What a command prints; if it fails the test does, with what it said."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout


@contextmanager
def namespaces() -> Iterator[Callable[[], Netns]]:
    """Makes namespaces when called; they are gone at the end."""
    made: list[Netns] = []

    def make() -> Netns:
        made.append(Netns(f"{PREFIX}{os.getpid()}-{next(_numbers)}"))
        command("ip", "netns", "add", made[-1].name)
        return made[-1]

    try:
        yield make
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "del", namespace.name], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / namespace.name, ignore_errors=True)


def remove_abandoned() -> None:
    """Removes the namespaces of test processes that were killed."""
    for path in RUN.glob(f"{PREFIX}*"):
        pid = path.name.removeprefix(PREFIX).split("-")[0]
        if not (Path("/proc") / pid).exists():
            command("ip", "netns", "del", path.name)
