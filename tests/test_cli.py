"""The command `appliance`: what it prints, what it exits with, and how soon."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from appliance import __version__
from appliance.cli import main
from appliance.client import ApiError, Client
from appliance.config import Config
from appliance.config_text import example, in_force, schema
from appliance.observe.meanings import SENTENCES
from tests.conftest import ROOT

START_LIMIT = 0.4
"""CPU seconds that help and the config commands may take to start."""
HEAVY = {"numba", "numpy", "aiohttp", "pyroute2", "uvloop", "rich", "http.client", "asyncio"}
"""Modules that no command may import before it needs them."""


def call(*arguments: str, **environment: str) -> Result:
    """Runs a command line in this process."""
    return CliRunner().invoke(main, arguments, env={"APPLIANCE_SOCKET": None, **environment})


# --- Without a running appliance ----------------------------------------------------------------


def test_config_check_of_a_right_file(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text(example())
    assert (call("config", "check", str(path)).output, call("config", "check", str(path)).exit_code) == (
        "ok\n",
        0,
    )
    assert json.loads(call("config", "check", "--json", str(path)).output) == {"ok": True, "problems": []}


def test_config_check_of_a_wrong_file(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text("tunnel.port = 0\n\nlog.level = 1\n")
    result = call("config", "check", str(path))
    assert result.exit_code == 1
    assert [line.split(": ")[:2] for line in result.output.splitlines()] == [
        [f"{path}:1", "tunnel.port"],
        [f"{path}:3", "log.level"],
    ]


def test_config_check_prints_problems_as_json(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text("tunnel.port = 0\n")
    result = call("config", "check", "--json", str(path))
    problem = {
        "file": str(path),
        "line": 1,
        "key": "tunnel.port",
        "expected": "an integer from 1 to 65535",
        "got": "0",
    }
    assert (result.exit_code, json.loads(result.output)) == (1, {"ok": False, "problems": [problem]})


def test_config_check_for_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text("workers.cpus = [900]\n")
    assert call("config", "check", str(path)).exit_code == 1
    assert call("config", "check", "--cpus", "901", str(path)).exit_code == 0


def test_config_show_example_and_schema(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text("")
    assert call("config", "show", "-c", str(path)).output == in_force(Config())
    shown = json.loads(call("config", "show", "--json", "-c", str(path)).output)
    assert shown == Config().model_dump(mode="json")
    assert call("config", "example").output == example()
    assert json.loads(call("config", "schema").output) == schema()


@pytest.mark.parametrize("command", ["run", "warm"])
def test_a_wrong_configuration_stops_a_command(command: str, tmp_path: Path) -> None:
    result = call(command, "-c", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert result.stderr == (f"{tmp_path}/none: file: expected a readable file, got No such file or directory\n")


def test_config_diff_says_what_a_reload_would_apply(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("")
    new.write_text("log.level = 'debug'\ntunnel.port = 50104\n")
    assert call("config", "diff", str(old), str(new)).output.splitlines() == [
        "tunnel.port: 50103 → 50104 (needs restart)",
        'log.level: "info" → "debug" (reloadable)',
    ]
    assert call("config", "diff", str(old), str(old)).output == "no difference\n"
    (first, _) = json.loads(call("config", "diff", "--json", str(old), str(new)).output)["differences"]
    assert first == {"key": "tunnel.port", "old": 50103, "new": 50104, "reloadable": False}


def test_the_command_reference_is_current() -> None:
    """`make cli` writes it."""
    assert (ROOT / "docs/cli.md").read_text() == call("cli-reference").output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_comes_with_the_command(shell: str) -> None:
    line = [str(Path(sys.executable).with_name("appliance"))]
    environment = {**os.environ, "_APPLIANCE_COMPLETE": f"{shell}_source"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "appliance" in done.stdout
    assert "_APPLIANCE_COMPLETE" in done.stdout


def test_version_names_the_appliance_and_its_kernel() -> None:
    data = json.loads(call("version", "--json").output)
    assert (data["appliance"], data["kernel"]) == (__version__, os.uname().release)


@pytest.mark.parametrize(
    "arguments",
    [
        ["attach", "--service", "a.b.c.d", "--instance", "0"],
        ["attach", "--service", "a.b.c.d", "--instance", "0", "--pid", "1", "--netns", "x"],
        ["attach", "--service", "a.b.c.d", "--instance", "-1", "--pid", "1"],
        ["detach", "--service", "a.b.c.d"],
        ["nonsense"],
    ],
)
def test_a_wrong_command_line_is_status_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")


# --- Start --------------------------------------------------------------------------------------


def test_the_command_imports_nothing_heavy() -> None:
    code = "import sys, appliance.cli, appliance.config_text; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert HEAVY & set(loaded.stdout.split()) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["config", "check", "config/appliance.toml"]], ids=" ".join)
def test_the_command_starts_quickly(arguments: list[str]) -> None:
    """In CPU time, the best of three, so that a busy machine does not matter."""
    assert min(cpu_seconds(arguments) for _ in range(3)) < START_LIMIT


def cpu_seconds(arguments: list[str]) -> float:
    """CPU time of one run of the command, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "appliance", *arguments], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --- With an API --------------------------------------------------------------------------------

ATTACHMENT = {
    "service": "app.ns.web.test",
    "instance": 0,
    "interface": "ea0123456789",
    "address_v4": "10.18.0.2",
    "address_v6": None,
    "gateway_v4": "10.18.0.1",
    "gateway_v6": None,
}
STATUS = {
    "node": {"address": "192.0.2.1", "port": 50103, "last_error": "expected [log], got [/x] :+1:"},
    "workers": [
        {
            "index": 0,
            "pid": 11,
            "cpu": 0,
            "restarts": 0,
            "heartbeat_ns": 3966226950800,
            "counters": {"sent": 1234567},
            "drops": {"tun": {"no-route": 0}},
            "stages": {"wait": 750, "read": 200, "send": 50, "turns": 3, "packets": 9},
        },
        {"index": 1, "pid": 12, "cpu": 1, "restarts": 3, "counters": {"sent": 0}, "drops": {"tun": {"no-route": 7}}},
    ],
    "offloads": {
        "tun_tso": {"wanted": True, "on": True, "reason": ""},
        "tun_uso": {"wanted": True, "on": False, "reason": "refused"},
    },
    "tables": {"epoch": 3, "hosts": 4},
}
FLOW = {"worker": 0, "protocol": "tcp", "source": "10.18.0.2", "destination": "10.30.30.30"}
ANSWERS: dict[str, tuple[int, Any]] = {
    "POST /v1/attachments": (201, ATTACHMENT),
    "GET /v1/attachments": (200, {"attachments": [ATTACHMENT]}),
    "DELETE /v1/attachments/app.ns.web.test/0": (204, None),
    "DELETE /v1/attachments/app.ns.web.test/1": (404, {"error": "instance: expected an attached one, got 1"}),
    "POST /v1/reload": (200, {"changed": ["log.level"]}),
    "GET /v1/status": (200, STATUS),
    "GET /v1/flows": (200, {"flows": [FLOW]}),
}


class _Handler(BaseHTTPRequestHandler):
    """Answers from ANSWERS and keeps what it was asked."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def answer(self) -> None:
        target = f"{self.command} {self.path}"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((target, json.loads(body) if body else None))
        status, data = ANSWERS.get(target, (404, {"error": f"path: expected a known one, got {target}"}))
        raw = b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_POST = do_DELETE = answer  # noqa: N815

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: pytest's output is not an access log."""


class _Server(ThreadingHTTPServer):
    address_family = socket.AF_UNIX
    asked: list[tuple[str, Any]]

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[_Server]:
    """An HTTP server at a unix socket that knows the local API's answers."""
    server = _Server(str(tmp_path / "api.sock"), _Handler)  # type: ignore[arg-type]
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(api: _Server, *arguments: str) -> Result:
    """Runs a command line against the server."""
    return call(*arguments, APPLIANCE_SOCKET=str(api.server_address))


@pytest.mark.parametrize(
    ("option", "value", "sent"),
    [("--netns", "web", {"netns": "web"}), ("--pid", "17", {"pid": 17}), ("--path", "/x", {"path": "/x"})],
)
def test_attach_names_the_namespace(api: _Server, option: str, value: str, sent: dict[str, Any]) -> None:
    result = ask(api, "attach", "--service", "app.ns.web.test", "--instance", "0", option, value)
    assert result.exit_code == 0
    assert "address_v4 10.18.0.2" in result.output.splitlines()
    assert "address_v6" not in result.output
    assert api.asked == [("POST /v1/attachments", {"service": "app.ns.web.test", "instance": 0, **sent})]


def test_detach(api: _Server) -> None:
    result = ask(api, "detach", "--service", "app.ns.web.test", "--instance", "0")
    assert (result.exit_code, result.output) == (0, "")
    assert api.asked == [("DELETE /v1/attachments/app.ns.web.test/0", None)]


def test_an_error_of_the_api_is_one_line(api: _Server) -> None:
    result = ask(api, "detach", "--service", "app.ns.web.test", "--instance", "1")
    assert (result.exit_code, result.stderr) == (1, "appliance: instance: expected an attached one, got 1\n")


def test_a_service_name_is_one_part_of_the_path(api: _Server) -> None:
    ask(api, "detach", "--service", "a/../b c", "--instance", "0")
    assert api.asked == [("DELETE /v1/attachments/a%2F..%2Fb%20c/0", None)]


@pytest.mark.parametrize(
    ("command", "data"),
    [
        ("status", STATUS),
        ("flows", {"flows": [FLOW]}),
        ("attachments", {"attachments": [ATTACHMENT]}),
        ("reload", {"changed": ["log.level"]}),
    ],
)
def test_json_is_the_apis_answer(api: _Server, command: str, data: dict[str, Any]) -> None:
    assert json.loads(ask(api, command, "--json").output) == data


def test_status_shows_facts_workers_and_counters(api: _Server) -> None:
    lines = [line.split() for line in ask(api, "status").output.splitlines()]
    assert ["address", "192.0.2.1"] in lines
    assert ["last_error", "expected", "[log],", "got", "[/x]", ":+1:"] in lines
    assert ["tun_uso", "yes", "no", "refused"] in lines
    assert ["hosts", "4"] in lines
    assert ["1", "12", "1", "3", "0", "7"] in lines
    assert ["from", "containers", "no-route", "7", *SENTENCES["no-route"].split()] in lines
    counted = [line.split() for line in ask(api, "status", "--counters").output.splitlines()]
    assert ["sent", "1", "234", "567", "0"] in counted
    assert ["drops.tun.no-route", "0", "7"] in counted
    assert ["read", "20.0", "0.0"] in counted


def test_flows_and_attachments_are_tables(api: _Server) -> None:
    assert ["0", "tcp", "10.18.0.2", "10.30.30.30"] in map(str.split, ask(api, "flows").output.splitlines())
    assert "ea0123456789" in ask(api, "attachments").output


def test_reload_prints_what_changed(api: _Server) -> None:
    assert ask(api, "reload").output == "log.level\n"


# --- An API that does not answer ----------------------------------------------------------------


def test_no_socket(tmp_path: Path) -> None:
    result = call("status", "--socket", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert result.stderr == (
        f"appliance: no socket {tmp_path}/none: the appliance is not running, or --socket names another\n"
    )


def test_a_socket_that_nobody_listens_at(tmp_path: Path) -> None:
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    result = call("status", "--socket", str(path))
    assert (result.exit_code, result.stderr) == (
        1,
        f"appliance: nobody listens at {path}: the appliance is not running\n",
    )


def test_a_socket_path_that_is_too_long(tmp_path: Path) -> None:
    result = call("status", "--socket", f"/{'s' * 200}")
    assert result.exit_code == 1
    assert result.stderr.endswith("AF_UNIX path too long\n")


@contextmanager
def speaking(path: Path, words: bytes | None) -> Iterator[None]:
    """A listener that answers one request with these bytes, or never (None)."""
    done = threading.Event()

    def serve(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(4096)
            if words is None:
                done.wait(10)
            else:
                peer.sendall(words)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        yield
        done.set()
        thread.join()


OTHERS = {
    "another protocol": (b"hello\r\n\r\n", "hello"),
    "nothing at all": (b"", "closed connection"),
    "a page": (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "expected JSON, got b'<html>'"),
    "an error page": (b"HTTP/1.1 502 Bad\r\nContent-Length: 2\r\n\r\n{}", "status 502"),
    "an array": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "expected a JSON object, got list"),
    "half an answer": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "IncompleteRead"),
}


@pytest.mark.parametrize(("words", "sentence"), OTHERS.values(), ids=OTHERS)
def test_a_socket_where_somebody_else_answers(tmp_path: Path, words: bytes, sentence: str) -> None:
    with speaking(tmp_path / "s", words):
        result = call("status", "--socket", str(tmp_path / "s"))
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_api_that_hangs(tmp_path: Path) -> None:
    with speaking(tmp_path / "s", None), pytest.raises(ApiError, match=r"no answer from .* within 0\.05 s"):
        Client(tmp_path / "s", timeout=0.05).status()
