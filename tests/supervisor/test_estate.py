"""What a supervisor does with what another one left: decided by their manifests, and by nothing else."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from appliance.config import Config, keys
from appliance.supervisor import estate, main
from appliance.supervisor.errors import StartError
from appliance.supervisor.estate import Step
from appliance.supervisor.notify import Systemd, kept

OURS = estate.manifest(Config(), 2, 7)


def changed(**sections: dict[str, object]) -> dict[str, object]:
    return estate.manifest(Config.model_validate(sections), 2, 7)


def test_the_same_is_adopted() -> None:
    assert estate.verdict(OURS, estate.manifest(Config(), 2, 0)).step is Step.ADOPT


@pytest.mark.parametrize(
    ("found", "step", "why"),
    [
        ({**OURS, "layout": "0"}, Step.REFUSE, "cannot read: end them with `appliance cleanup --processes`"),
        ({}, Step.REFUSE, "cannot read"),
        ({**OURS, "workers": 3}, Step.ANEW, "changed: workers.count"),
        (changed(tunnel={"port": 1}, tables={"hosts": 16}), Step.ANEW, "changed: tunnel.port, tables.hosts"),
        ({**OURS, "code": "0"}, Step.RENEW, "changed: the packet path"),
        (changed(workers={"busy_poll": 5}), Step.RENEW, "changed: workers.busy_poll"),
        ({**OURS, "appliance": "0.0.1", "seed": 1}, Step.ADOPT, ""),
        (changed(naming={"ttl": 9}, cluster={"keepalive": 9}), Step.ADOPT, ""),
    ],
)
def test_what_differs_decides(found: dict[str, object], step: Step, why: str) -> None:
    verdict = estate.verdict(found, OURS)
    assert verdict.step is step
    assert why in verdict.why


def test_each_key_of_workers_and_devices_is_compared() -> None:
    """A key that a worker, a device or a table is made by must not be changed behind the back of one that runs."""
    mine = {
        key
        for key in (it.dotted for it in keys())
        if key.partition(".")[0] in ("tunnel", "workers", "offload", "tables")
    }
    elsewhere = {"tunnel.advertised_port", "tunnel.mtu", "workers.count", "tables.static"}
    assert mine - elsewhere == {key for key in (*estate.FIXED, *estate.SPAWNED) if not key.startswith("network.")}


def test_an_estate_that_lacks_something_is_not_complete() -> None:
    names = ["tables", "sticky", *(f"0.{name}" for name in estate._EACH), "0.source.0"]
    assert estate.Estate({}, dict.fromkeys(names, -1)).is_complete(1, 1)
    for name in names:
        assert not estate.Estate({}, dict.fromkeys(set(names) - {name}, -1)).is_complete(1, 1), name


@pytest.mark.parametrize(
    ("manifest", "step"),
    [(OURS, Step.ANEW), ({**OURS, "code": "0"}, Step.ANEW), ({**OURS, "layout": "0"}, Step.REFUSE)],
)
def test_something_that_lacks_begins_anew_but_another_layout_is_left_alone(
    manifest: dict[str, object], step: Step
) -> None:
    """Its names are others too: nothing of it may count as missing, as then what runs would be ended."""
    assert estate.decided(estate.Estate(manifest), OURS).step is step


class Store:
    """A service manager that keeps descriptors, as systemd does."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.kept: list[tuple[str, int]] = []
        self.said: list[str] = []

    def listen(self) -> None:
        while True:
            try:
                self.one()
            except BlockingIOError:
                return

    def one(self) -> None:
        data, fds, _, _ = socket.recv_fds(self.socket, 4096, 4)
        lines = data.decode().split("\n")
        name = next((it.partition("=")[2] for it in lines if it.startswith("FDNAME=")), "")
        if "FDSTORE=1" in lines:
            assert "FDPOLL=0" in lines
            self.kept.append((name, fds[0]))
        elif "FDSTOREREMOVE=1" in lines:
            self.kept = [it for it in self.kept if it[0] != name]
        elif "BARRIER=1" in lines:
            assert lines == ["BARRIER=1"]
            os.close(fds[0])
        else:
            self.said += lines

    def environment(self) -> dict[str, str]:
        """How the next process hears of them; they are moved to where it expects them."""
        return {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(self.kept)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in self.kept),
        }


def test_systemd_keeps_what_it_was_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "notify")
    said: list[dict[str, object]] = []
    systemd = Systemd({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    keepers = estate.Keepers(systemd, lambda message, _fds: said.append(message))
    one, two = os.memfd_create("one"), os.memfd_create("two")
    os.write(two, b"second")
    keepers.keep({"tables": one})
    keepers.keep({"tables": two, "sticky": one})
    keepers.describe(OURS)
    store.listen()
    assert [name for name, _ in store.kept] == ["tables", "sticky", "manifest"]
    assert [next(iter(it)) for it in said] == ["hold", "hold", "manifest"]

    monkeypatch.setattr("appliance.supervisor.notify.LISTEN_FDS_START", store.kept[0][1])
    environment = store.environment()
    assert [fd for _, fd in store.kept] == list(range(store.kept[0][1], store.kept[0][1] + 3)), (
        "as systemd numbers them"
    )
    found = estate.found(tmp_path, kept(environment))
    assert environment == {}
    assert found is not None
    assert dict(found.manifest) == OURS
    assert os.pread(found.take("tables"), 16, 0) == b"second"
    assert set(found.held) == {"sticky"}

    keepers.clear()
    store.listen()
    assert store.kept == []


def test_the_watchdog_hears_of_a_start_that_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart, when systemd listens for it all the time."""
    store = Store(tmp_path / "notify")

    async def start(_: main.Supervisor) -> None:
        while store.said.count("WATCHDOG=1") < 3:
            await asyncio.sleep(0.01)
            store.listen()
        raise StartError("heard")

    monkeypatch.setattr(main.Supervisor, "start", start)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    config = Config.model_validate({"node": {"address": "192.0.2.1"}})
    with pytest.raises(StartError, match="heard"):
        asyncio.run(asyncio.wait_for(main._serve(config, tmp_path), 20))


def test_descriptors_for_another_process_are_not_taken() -> None:
    assert kept({"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "tables"}) == {}
    assert kept({}) == {}


def test_without_systemd_nothing_is_said() -> None:
    Systemd({}).say("READY=1")
    Systemd({"NOTIFY_SOCKET": "/nowhere/notify"}).say("READY=1")  # and one that is gone costs nothing


def test_a_systemd_that_does_not_read_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("appliance.supervisor.notify.PATIENCE_S", 0.001)
    systemd = Systemd({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(str(tmp_path / "notify"))
        while "systemd does not listen" not in caplog.text:
            systemd.say("WATCHDOG=1")
