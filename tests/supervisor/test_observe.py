"""What operators and their monitoring see of two running nodes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from threading import Event
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import pytest
import yaml
from pcapng import FileScanner
from pcapng.blocks import EnhancedPacket
from prometheus_client.parser import text_string_to_metric_families

from appliance.client import ApiError
from appliance.observe import packets
from appliance.supervisor.naming import REPLY_S
from tests.conftest import ROOT
from tests.environment.netns import Netns
from tests.supervisor.pair import METRICS_PORT, Pair
from tests.supervisor.world import HUB, Node, ping, until

pytestmark = pytest.mark.root
PROMETHEUS_PORT = 9990


def get(place: Netns, url: str) -> tuple[int, bytes]:
    """A page, seen from a namespace."""

    def fetch() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()

    return place.call(fetch)


def page(pair: Pair, node: Node, path: str) -> tuple[int, bytes]:
    return get(pair.world.hub, f"http://{node.address}:{METRICS_PORT}{path}")


def samples(pair: Pair, node: Node) -> dict[tuple[str, ...], float]:
    status, body = page(pair, node, "/metrics")
    assert status == 200
    found = [it for family in text_string_to_metric_families(body.decode()) for it in family.samples]
    return {(it.name, *it.labels.values()): it.value for it in found}


def command(node: Node, *arguments: str) -> str:
    """The output of `appliance …` on a node."""
    environment = {**os.environ, "APPLIANCE_SOCKET": str(node.socket)}
    line = [sys.executable, "-m", "appliance", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_health_and_readiness(pair: Pair) -> None:
    for path in ("/healthz", "/readyz"):
        assert page(pair, pair.one, path) == (200, b'{"ok":true,"reasons":[]}')
    assert page(pair, pair.one, "/v1/status")[0] == 404, "only what changes nothing is at this port"


def test_a_resolver_that_hangs_is_told_and_not_waited_for(pair: Pair) -> None:
    until(lambda: page(pair, pair.one, "/readyz")[0] == 200, "the resolver answers")
    (resolver,) = pair.one.resolvers()
    os.kill(resolver, signal.SIGSTOP)
    try:
        status, body = page(pair, pair.one, "/readyz")
        assert (status, json.loads(body)["reasons"]) == (503, ["the resolver does not answer"])
        began = time.monotonic()
        assert page(pair, pair.one, "/healthz")[0] == 200
        assert time.monotonic() - began < REPLY_S
    finally:
        os.kill(resolver, signal.SIGCONT)
    until(lambda: page(pair, pair.one, "/readyz")[0] == 200, "it answers again")


def test_a_dropped_packet_is_counted_where_operators_look(pair: Pair) -> None:
    before = samples(pair, pair.two)["appliance_drops_total", "tun", "no-route"]
    assert not ping(pair.client, "10.19.250.250", wait=1)
    after = samples(pair, pair.two)
    assert after["appliance_drops_total", "tun", "no-route"] == before + 1
    (row,) = [it for it in json.loads(command(pair.two, "drops", "--json"))["drops"] if it["reason"] == "no-route"]
    assert row["packets"] == before + 1
    assert "neither a ServiceIP" in row["meaning"]
    assert "no-route" in command(pair.two, "drops")


def test_status_fits_a_screen(pair: Pair) -> None:
    shown = command(pair.two, "status").splitlines()
    assert shown[0] == "healthy, ready"
    assert len(shown) <= 50
    assert any(line.split()[:2] == ["connected", "yes"] for line in shown)


def test_top_counts_what_goes_on(pair: Pair) -> None:
    line = ["ip", "netns", "exec", pair.client.name, "ping", "-q", "-i", "0.01", "10.19.250.250"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as child:
        try:
            looks = [json.loads(it) for it in command(pair.two, "top", "--json", "--count", "2").splitlines()]
        finally:
            child.kill()
    assert len(looks) == 2
    assert looks[1]["workers"][0]["from container packets"] > 10
    assert [it["reason"] for it in looks[1]["drops"]] == ["no-route"]


def test_a_refused_reload_is_a_metric_until_one_succeeds(pair: Pair) -> None:
    file = pair.one.directory / "appliance.toml"
    right = file.read_text()
    try:
        file.write_text("tunnel.port = 0\n")
        with pytest.raises(Exception, match=r"tunnel\.port: expected an integer"):
            pair.one.api.reload()
        assert samples(pair, pair.one)["appliance_config_last_reload_successful",] == 0
    finally:
        file.write_text(right)
    pair.one.api.reload()
    after = samples(pair, pair.one)
    assert after["appliance_config_last_reload_successful",] == 1
    assert after["appliance_reloads_total", "reload", "refused"] >= 1


def test_trace_on_a_running_node(pair: Pair) -> None:
    """Before the node knows the service, after it was asked for, and with the flow there."""
    ours = pair.two.api.attachments()[0]["address_v4"]
    with pair.service() as service:
        line = ["trace", ours, service.address, "--protocol", "icmp", "--sport", "7", "--json"]
        assert json.loads(command(pair.two, *line))["verdict"] == "held"
        answer = json.loads(command(pair.two, *line, "--ask"))
        assert (answer["verdict"], answer["certain"], answer["is_new"]) == ("sent", True, True)
        assert answer["node"] == f"{pair.one.address}:50103"
        assert answer["becomes"].endswith(service.namespace_ip)
        assert ping(pair.client, service.address)
        shown = command(pair.two, "trace", ours, "10.19.250.250").splitlines()
        assert shown[0].startswith("no-route: tcp ")
        assert any("the sender is told: tcp 10.19.250.250" in it for it in shown)
    nobody = json.loads(command(pair.two, "trace", ours, "10.30.99.99", "--ask", "--json"))
    assert nobody["verdict"] == "unknown-service"
    spoofed = json.loads(command(pair.two, "trace", "10.19.1.1", ours, "--from-node", "192.0.2.77", "--json"))
    assert spoofed["verdict"] == "unknown-peer"


def test_a_trace_of_nonsense_is_one_line(pair: Pair) -> None:
    for packet, said in (
        ({"source": "x", "destination": "10.0.0.1"}, "source"),
        ({"source": "10.0.0.1", "destination": "fc00::1"}, "destination: expected an address of the source's family"),
        ({"source": "10.0.0.1", "destination": "10.0.0.2", "protocol": "smtp"}, "protocol: expected"),
    ):
        with pytest.raises(ApiError, match=said):
            pair.one.api.trace(packet)


@contextmanager
def capture(node: Node, file: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`appliance capture`, which has begun; it ends with the block."""
    line = [sys.executable, "-m", "appliance", "capture", str(file), "--socket", str(node.socket), *options]
    with subprocess.Popen(line, cwd=ROOT) as child:
        try:
            until(lambda: file.exists() and file.stat().st_size > 0, "the capture has begun", 20.0)
            yield child
        finally:
            child.kill()


def test_a_capture_shows_both_sides_of_a_translation(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "flow.pcapng"
    ours = pair.two.api.attachments()[0]["address_v4"]
    with pair.service() as service:
        until(lambda: ping(pair.client, service.address), "the service answers")
        with capture(pair.two, file, "--host", ours, "--host", service.address, "--count", "4") as child:
            with pytest.raises(ApiError, match="one at a time"), pair.two.api.capture({}):
                pass
            assert not ping(pair.client, "10.19.250.250", wait=1), "of another flow: not captured"
            assert ping(pair.client, service.address)
            assert child.wait(20) == 0
    found = [it for it in FileScanner(file.open("rb")) if isinstance(it, EnhancedPacket)]
    ends = {(it.interface_id, packets.read(it.packet_data).destination) for it in found}  # type: ignore[union-attr]
    assert {number for number, _ in ends} == {0, 1, 2, 3}
    assert (0, ip_address(service.address)) in ends
    assert (1, ip_address(service.namespace_ip)) in ends
    if shutil.which("tshark"):
        fields = ["-T", "fields", "-e", "frame.interface_name", "-e", "ip.dst", "-e", "frame.comment"]
        shown = subprocess.run(["tshark", "-r", file, *fields], capture_output=True, text=True, check=True).stdout
        lines = [line.split("\t") for line in shown.splitlines()]
        assert ["from-container", service.address, "worker 0"] in lines
        assert ["to-node", service.namespace_ip, f"worker 0; to node {pair.one.address}:50103"] in lines


@pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")
def test_tshark_is_here() -> None:
    """Its part of the test above ran."""


def test_a_capture_that_is_left_ends_and_gives_its_memory_back(pair: Pair, tmp_path: Path) -> None:
    with capture(pair.two, tmp_path / "drops.pcapng", "--drops"):
        pass

    def again() -> bool:
        with suppress(ApiError), pair.two.api.capture({"seconds": 0.1}) as pieces:
            return len(b"".join(pieces)) > 0
        return False

    until(again, "the next capture may begin")


def test_doctor_finds_a_well_node_well_and_names_what_is_not(pair: Pair) -> None:
    file = str(pair.two.directory / "appliance.toml")
    place = ["ip", "netns", "exec", pair.two.namespace.name, sys.executable, "-m", "appliance", "doctor", "-c", file]
    line = [*place, "--socket", str(pair.two.socket), "--json"]
    until(lambda: page(pair, pair.two, "/readyz")[0] == 200, "the node is ready", 30)
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    findings = {it["check"]: it for it in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, done.stdout
    for check in ("kernel", "TUN", "capabilities", "broker", "node", "udp_gso", "path MTU", "cluster"):
        assert findings[check]["state"] in ("ok", "warning"), findings[check]
    done = subprocess.run([*place, "--socket", "/none"], capture_output=True, text=True, cwd=ROOT)
    assert "no socket /none: the appliance is not running" in done.stdout


@contextmanager
def busy(node: Node) -> Iterator[None]:
    """The supervisor has questions to answer, one after another."""
    done = Event()

    def ask() -> None:
        while not done.is_set():
            node.api.status()

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield
        finally:
            done.set()
            asking.result()


def test_the_supervisors_profile_is_a_flame_graph_of_its_functions(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "flame.svg"
    config = str(pair.two.directory / "appliance.toml")
    with busy(pair.two):
        command(pair.two, "profile", "supervisor", str(file), "--seconds", "1", "-c", config)
    text = file.read_text()
    assert "<svg" in text
    assert "supervise" in text or "appliance" in text


# --- Prometheus itself --------------------------------------------------------------------------


def expressions() -> Iterator[tuple[str, str]]:
    """Every query of the dashboard, and what each alert compares, by its title."""
    for panel in json.loads((ROOT / "config/grafana.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "30s").replace("$node", ".*")
            yield panel["title"], expression
    for group in yaml.safe_load((ROOT / "config/alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            for part in rule["expr"].split(" and "):
                yield rule["alert"], re.sub(r"\s*(==|>)\s*[\d.]+$", "", part)


@contextmanager
def prometheus(pair: Pair, directory: Path) -> Iterator[None]:
    """A Prometheus on the hub that scrapes both nodes."""
    targets = [f"{node.address}:{METRICS_PORT}" for node in (pair.one, pair.two)]
    job = {"job_name": "edge", "scrape_interval": "1s", "static_configs": [{"targets": targets}]}
    config = {"scrape_configs": [job], "rule_files": [str(ROOT / "config/alerts.yml")]}
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    line = ["ip", "netns", "exec", pair.world.hub.name, "prometheus", "--log.level=error"]
    line += [f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    line += [f"--web.listen-address={HUB}:{PROMETHEUS_PORT}"]
    with (directory / "log").open("wb") as log, subprocess.Popen(line, stdout=log, stderr=log) as child:
        try:
            yield
        finally:
            child.kill()


def ask(pair: Pair, expression: str) -> list[Any]:
    """The series of a query; none while the server is not ready."""
    try:
        status, body = get(pair.world.hub, f"http://{HUB}:{PROMETHEUS_PORT}/api/v1/query?query={quote(expression)}")
    except OSError:
        return []
    if status == 503:
        return []
    answer = json.loads(body)
    assert answer.get("status") == "success", (expression, answer)
    return list(answer["data"]["result"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_promtool_accepts_alerts_and_metrics(pair: Pair) -> None:
    rules = subprocess.run(["promtool", "check", "rules", ROOT / "config/alerts.yml"], capture_output=True, text=True)
    assert rules.returncode == 0, rules.stdout + rules.stderr
    _, body = page(pair, pair.one, "/metrics")
    lint = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True)
    assert (lint.returncode, lint.stderr) == (0, b"")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian: prometheus)")
def test_prometheus_has_data_for_every_query_of_dashboard_and_alerts(pair: Pair, tmp_path: Path) -> None:
    """Also for round-trip times, for which a service of policy `closest` has to be known."""
    with pair.closest() as address, prometheus(pair, tmp_path):
        until(lambda: ping(pair.client, address), "the service answers")
        waiting = dict.fromkeys(expressions())

        def rest() -> bool:
            for it in [it for it in waiting if ask(pair, it[1])]:
                del waiting[it]
            return not waiting

        try:
            until(rest, "every query has data", 30.0)
        except AssertionError:
            pytest.fail(f"no data: {list(waiting)}")
        assert ask(pair, "up") != []
        assert ask(pair, "ALERTS{severity='critical'}") == []
