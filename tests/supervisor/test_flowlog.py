"""The flow log of a running node, of real flows."""

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance.client import ApiError
from appliance.supervisor.flowlog import Output
from tests.supervisor.pair import CLIENTS, TWO, Pair
from tests.supervisor.sockets import PORT, made, say, tcp_echo
from tests.supervisor.test_observe import command, samples
from tests.supervisor.world import ping, until

RESET = struct.pack("ii", 1, 0)
"""struct linger of a socket whose end is a reset (socket(7)): nothing of it waits, and its port is free."""


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@contextmanager
def logging_to(pair: Pair, file: Path, more: str = "") -> Iterator[Path]:
    """The second node writes a flow log, and then none again."""
    configuration = pair.two.directory / "appliance.toml"
    before = configuration.read_text()
    head, tail = before.split("[flowlog]\n")
    rest = tail[tail.find("\n[") :]
    try:
        configuration.write_text(f'{head}[flowlog]\nenabled = true\nfile = "{file}"\n{more}{rest}')
        pair.two.api.reload()
        yield configuration
    finally:
        configuration.write_text(before)
        pair.two.api.reload()


def call(pair: Pair, address: str, port: int) -> None:
    """A connection from this port that says something, and is reset."""
    with made(pair.client, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.bind(("", port))
        sock.connect((address, PORT))
        assert say(sock, b"x" * 500) == b"x" * 500


@pytest.mark.root
def test_beginning_and_end_of_a_connection(pair: Pair, tmp_path: Path) -> None:
    """The end is seen at once, as the port is used again; and the file is opened anew at a reload."""
    file = tmp_path / "flows.jsonl"

    def of(port: int, event: str) -> list[dict[str, Any]]:
        return [it for it in records(file) if (it["event"], it.get("source_port")) == (event, port)]

    with logging_to(pair, file), pair.service() as service, tcp_echo(service.container):
        call(pair, service.address, 45001)
        (began,) = until(lambda: of(45001, "start"), "the beginning is written")
        assert began["service"] == service.job
        assert (began["client"], began["instance"]) == (f"{CLIENTS}.0", f"{service.job}.0")
        assert (began["node"], began["target_node"], began["worker"]) == (TWO, pair.one.address, 0)
        assert (began["destination"], began["target"]) == (service.address, service.namespace_ip)
        file.rename(tmp_path / "flows.1")
        pair.two.api.reload()
        call(pair, service.address, 45001)
        (ended,) = until(lambda: of(45001, "end"), "the end is written, to the new file")
        assert (ended["reason"], ended["start"] <= ended["time"]) == ("closed", True)
        assert ended["packets_out"] >= 3 <= ended["packets_in"]
        assert ended["bytes_out"] > 500 < ended["bytes_in"]
        assert len(of(45001, "start")) == 1
        assert samples(pair, pair.two)["appliance_flow_log_records_total", "written"] >= 3
        assert pair.two.api.status()["flow_log"]["last_error"] == ""
    written = len(records(file))
    assert not pair.two.api.status()["flow_log"]["enabled"]
    assert not ping(pair.client, "10.19.250.250", wait=1)
    assert len(records(file)) == written


@pytest.mark.root
def test_a_file_that_is_not_to_be_had_is_a_refused_reload_that_status_and_metrics_tell(pair: Pair) -> None:
    message = r"flowlog\.file: expected a file that can be written, got /none/flows: No such file"
    with pytest.raises(ApiError, match=message), logging_to(pair, Path("/none/flows")):
        pass
    assert samples(pair, pair.two)["appliance_config_last_reload_successful",] == 1
    configuration = pair.two.directory / "appliance.toml"
    before = configuration.read_text()
    try:
        configuration.write_text("tunnel.port = 0\n")
        with pytest.raises(ApiError):
            pair.two.api.reload()
        assert samples(pair, pair.two)["appliance_config_last_reload_successful",] == 0
        (line, *_) = command(pair.two, "status").splitlines()
        assert line.startswith("healthy, ready; the last reload was refused: ")
        assert "tunnel.port: expected an integer from 1 to 65535" in line
    finally:
        configuration.write_text(before)
    pair.two.api.reload()
    assert command(pair.two, "status").splitlines()[0] == "healthy, ready"


def test_a_full_disk_loses_records_and_breaks_no_later_line(tmp_path: Path) -> None:
    full = Output(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        full.write([b"{}\n"])
    output = Output(tmp_path / "flows")
    output.write([b'{"a":1}\n', b'{"b":'])  # as far as there was room
    output.close()
    output.write([b'{"c":1}\n'])
    output.close()
    assert (tmp_path / "flows").read_text().splitlines() == ['{"a":1}', '{"b":', '{"c":1}']
    assert (tmp_path / "flows").stat().st_mode & 0o777 == 0o640


def test_a_pipe_that_nobody_reads_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        Output(tmp_path / "pipe").open()
