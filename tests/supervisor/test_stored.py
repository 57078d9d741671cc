"""Supervisor and template die, and what they worked with is where systemd kept it."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.config import Config
from appliance.config_text import in_force
from appliance.supervisor import record
from tests.manager.processes import ROOT
from tests.supervisor.test_estate import Store
from tests.supervisor.test_handover import alone, workers
from tests.supervisor.world import READY_S, Node, World, until

pytestmark = pytest.mark.root

LAUNCH = """
import os, sys
fds = [os.dup2(int(it), 500 + i) for i, it in enumerate(sys.argv[1].split(","))]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
os.closerange(3 + len(fds), 4096)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""A program with descriptors where systemd puts them."""


class Unit(Store):
    """systemd, for one service; its store closes what it gives up."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            if select.select([self.socket], [], [], 0.05)[0]:
                before = self.kept
                self.one()
                for fd in {fd for _, fd in before} - {fd for _, fd in self.kept}:
                    os.close(fd)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self.socket.close()
        for _, fd in self.kept:
            os.close(fd)

    def start_again(self, node: Node) -> None:
        """As after the main process was killed."""
        file = node.directory / "appliance.toml"
        file.write_text(in_force(Config.model_validate(node._config())))
        said = self.environment()
        environment = {**os.environ, "LISTEN_FDS": said["LISTEN_FDS"], "LISTEN_FDNAMES": said["LISTEN_FDNAMES"]}
        fds = [fd for _, fd in self.kept]
        command = [sys.executable, "-c", LAUNCH, ",".join(map(str, fds)), "ip", "netns", "exec", node.namespace.name]
        command += [sys.executable, "-m", "appliance", "run", "-c", str(file)]
        with node.log.open("ab") as log:
            node.popen = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment, pass_fds=fds, start_new_session=True
            )
        until(node._answers, "it is ready again", READY_S)
        until(lambda: node.api.status()["naming"]["ready"], "its resolver has taken over", READY_S)


@pytest.fixture
def unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unit]:
    made = Unit(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield made
    made.end()


def kill_both(node: Node) -> None:
    living = record.alive(node.directory / "run")
    for name in ("supervisor", "template"):
        os.kill(living[name], signal.SIGKILL)
    assert node.popen is not None
    node.popen.wait()
    until(lambda: record.started(living["template"]) == 0, "it has ended")


def test_workers_go_on_or_end_but_are_never_two(hub: World, unit: Unit) -> None:
    node = alone(hub).start()
    before = workers(node)
    kill_both(node)
    unit.start_again(node)
    assert workers(node) == before, "those that run are watched on"

    until(lambda: "template" in record.alive(node.directory / "run"), "the next template is there")
    kill_both(node)
    node.settings["workers"]["flows"] = 2048
    unit.start_again(node)
    assert not any(map(record.started, before)), "others have other memory"
    assert 0 not in workers(node)
    names = [name for name, _ in unit.kept]
    assert sorted(set(names)) == sorted(names), "nothing of the ones before is kept"
    assert node.stop() == 0
    until(lambda: not node.processes(), "a stop on purpose ends everything")
    until(lambda: not unit.kept, "and has nothing kept")
