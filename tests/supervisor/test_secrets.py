"""Nothing that a node or a manager says, writes or is started with has a secret in it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from appliance.client import ApiError
from appliance.cluster.access import access
from appliance.cluster.manager import pki
from appliance.config import Config
from appliance.config_text import in_force
from tests.manager.processes import ROOT
from tests.supervisor.test_handover import again
from tests.supervisor.world import HUB, Node, World, until

pytestmark = pytest.mark.root

ONE = "65f0000000000000000000a1"
PASSWORD = "tr0ub4dor-and-3"


def secrets(directory: Path, password_file: Path) -> dict[str, str]:
    """What must be nowhere, by where it is: passwords, and each line of a key."""
    found = {"password": PASSWORD, "manager.password": (directory / "manager.password").read_text().strip()}
    for key in directory.rglob("*.key"):
        lines = [line for line in key.read_text().splitlines() if not line.startswith("-")]
        found |= {f"{key.name}, line {number}": line for number, line in enumerate(lines) if len(line) >= 16}
    assert len(found) >= 2 + 2 * 4
    assert password_file.stat().st_mode & 0o077 == 0
    return found


def said(node: Node, world: World) -> Iterator[tuple[str, bytes]]:
    """All that there is to read, by where it is."""
    yield "log of the node", node.log.read_bytes()
    for log in world.directory.glob("manager-*.log"):
        yield log.name, log.read_bytes()
    for directory in (node.directory / "run", node.state, world.directory / "cluster-run"):
        for file in filter(Path.is_file, directory.rglob("*")):
            if file.stat().st_mode & 0o077 or file.name != "nats-server.conf":
                yield str(file), file.read_bytes()
    its = str(node.directory / "appliance.toml")
    for words in (["status"], ["doctor", "-c", its], ["config", "show", "-c", its], ["config", "check", its]):
        socket = {} if words[0] == "config" else {"APPLIANCE_SOCKET": str(node.socket)}
        run = [sys.executable, "-m", "appliance", *words]
        done = subprocess.run(run, capture_output=True, cwd=ROOT, env={**os.environ, **socket}, check=False)
        yield str(words[0]), done.stdout + done.stderr
    yield "API", json.dumps([node.api.status(), node.api.cluster(), node.api.attachments()]).encode()
    for pid in [*node.processes(), *map(int, world.hub.command("ip", "netns", "pids", world.hub.name).split())]:
        for what in ("cmdline", "environ"):
            with suppress(FileNotFoundError):  # it has ended meanwhile
                yield f"/proc/{pid}/{what}", Path(f"/proc/{pid}/{what}").read_bytes()


def test_no_secret_is_anywhere(hub: World, long: bool) -> None:
    if not long:
        pytest.skip("two starts of a supervisor, and all that there is to read: only with --long")
    directory, password_file = hub.directory / "pki", hub.directory / "password"
    pki.init(directory, [HUB], [ONE])
    password_file.touch(mode=0o600)
    password_file.write_text(f"{PASSWORD}\n")
    pair = pki.pair(directory / pki.NODES, ONE)
    files = {"ca": str(directory / "ca.crt"), "certificate": str(pair.certificate), "key": str(pair.key)}
    cluster = {"url": f"mqtts://{HUB}", **files, "user": "me", "password_file": str(password_file)}
    hub.manager("--pki", str(directory), "--log-level", "debug")
    node = hub.member(ONE, cluster=cluster, log={"level": "debug"}).start()
    until(lambda: "Not authorized" in node.api.cluster()["last_error"], "this broker has no users with passwords")
    everything = secrets(directory, password_file)
    everything["identifier"] = access(Config.model_validate(node._config()).cluster).mark
    refused_reloads(node, pair.key.read_text())
    for name in ("user", "password_file"):
        del node.settings["cluster"][name]
    (node.directory / "appliance.toml").write_text(in_force(Config.model_validate(node._config())))
    everything["other identifier"] = access(Config.model_validate(node._config()).cluster).mark
    again(node, "restart")
    until(lambda: node.api.cluster()["connected"], "it is connected")
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers", 30)
    node.api.attach("app.ns.web.test", 0, {"netns": hub.container().name})
    seen = list(said(node, hub))
    assert {place for place, it in seen if it} >= {"log of the node", "manager-1.log", "status", "doctor", "config"}
    for place, content in seen:
        for name, secret in everything.items():
            if place.endswith("nats-server.log") and "identifier" in name:
                continue  # the broker's own log, which only root reads, names its clients
            assert secret.encode() not in content, f"{name} in {place}"


def refused_reloads(node: Node, key: str) -> None:
    """Somebody has written secrets into the configuration, which says what is wrong with that, and not what it is."""
    file = node.directory / "appliance.toml"
    right = file.read_text()
    for wrong in (f'url = "mqtts://me:{PASSWORD}@{HUB}"', f'password = "{PASSWORD}"', f'key = """{key}"""'):
        name = wrong.partition(" ")[0]
        file.write_text(re.sub(rf"(?m)^{name} = .*", "", right).replace("[cluster]", f"[cluster]\n{wrong}"))
        with pytest.raises(ApiError, match=rf"cluster\.{name}: expected"):
            node.api.reload()
    file.write_text(right)
