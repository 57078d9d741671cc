"""How the broker is reached: what the configuration may say, and that what it says is done or refused."""

import json
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from appliance.cluster import topics
from appliance.cluster.access import access
from appliance.cluster.broker import BrokerUrl, parse_url
from appliance.cluster.errors import ClusterError
from appliance.cluster.member import Member
from appliance.config import Cluster, Config, ConfigError, parse
from tests.cluster import wire
from tests.cluster.certificates import Authority, Pair
from tests.cluster.member import Subject, config, run, started
from tests.cluster.mosquitto import Mosquitto, free_port, mosquitto, needs_mosquitto

# --- The URL ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("broker.example", BrokerUrl("", "broker.example", 0)),
        ("192.0.2.9", BrokerUrl("", "192.0.2.9", 0)),
        ("2001:db8::9", BrokerUrl("", "2001:db8::9", 0)),
        ("[2001:db8::9]", BrokerUrl("", "2001:db8::9", 0)),
        ("mqtt://broker:1883", BrokerUrl("mqtt", "broker", 1883)),
        ("mqtts://broker", BrokerUrl("mqtts", "broker", 0)),
        ("mqtts://[2001:db8::9]:8883/", BrokerUrl("mqtts", "2001:db8::9", 8883)),
    ],
)
def test_an_url(text: str, url: BrokerUrl) -> None:
    assert parse_url(text) == url


WRONG_SCHEMES = ["", "broker:1883", "http://broker", "mqtt://", "a b", "[::1", "mqtt://[::1", "mqtts://bro ker"]
WRONG_RESTS = ["a:b@broker", "broker/path", "broker:0", "broker:70000", "broker:x", "broker?x=1", "broker#x"]


@pytest.mark.parametrize("text", [*WRONG_SCHEMES, *(f"mqtt://{rest}" for rest in WRONG_RESTS)])
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_url(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('url = "broker:1883"', "cluster.url: expected a host, mqtt://host:port or mqtts://host:port, or"),
        ('url = "mqtt://b,mqtts://c"', "cluster.url: expected a host, mqtt://host:port or mqtts://host:port, or"),
        ('certificate = "/c"', "cluster.key: expected a path, as cluster.certificate has one"),
        ('key = "/k"', "cluster.certificate: expected a path, as cluster.key has one"),
        ('password_file = "/p"', "cluster.user: expected a name, as cluster.password_file has a path"),
        ('url = "mqtt://b"\nca = "/c"', "cluster.url: expected an mqtts:// URL, as cluster.ca"),
    ],
)
def test_a_configuration_that_would_not_be_done_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"[cluster]\n{text}", "f")
    assert f": {problem}" in str(caught.value)


# --- Files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def node(authority: Authority) -> Pair:
    return authority.issue(wire.NODE)


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.issue("broker")


def tls(authority: Authority, pair: Pair) -> dict[str, Any]:
    """The keys of a connection with both certificates."""
    return {"ca": authority.certificate, "certificate": pair.certificate, "key": pair.key}


def secret_file(directory: Path, secret: str) -> Path:
    """A file that only its owner may read."""
    path = directory / "secret"
    path.write_text(f"{secret}\n")
    path.chmod(0o600)
    return path


def test_several_brokers_are_tried_in_turn() -> None:
    reached = access(Cluster(url="mqtts://one, mqtts://[::1]:8883"))
    assert str(reached) == "mqtts://one:10003,mqtts://[::1]:8883"
    assert [reached.broker(turn) for turn in range(3)] == [("one", 10003), ("::1", 8883), ("one", 10003)]


def test_a_host_alone_is_reached_in_cleartext_at_the_default_port() -> None:
    reached = access(Cluster(url="broker"))
    assert (str(reached), reached.tls, reached.user, reached.password) == ("mqtt://broker:10003", None, None, None)


def test_a_certificate_or_an_authority_means_tls(authority: Authority, node: Pair) -> None:
    assert str(access(Cluster(url="broker", ca=authority.certificate))) == "mqtts://broker:10003"
    assert str(access(Cluster(url="::1", port=1, **tls(authority, node)))) == "mqtts://[::1]:1"


def test_without_an_authority_the_systems_are_asked() -> None:
    reached = access(Cluster(url="mqtts://broker"))
    assert reached.tls is not None
    assert reached.tls.check_hostname


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    secret = secret_file(tmp_path, "hunter2")
    reached = access(Cluster(url="broker", user="me", password_file=secret))
    assert reached.password == "hunter2"
    assert "hunter2" not in f"{reached!r} {reached}"


def test_an_identifier_is_a_nodes_own_and_lasts(tmp_path: Path, authority: Authority, node: Pair) -> None:
    mine, again = (access(Cluster(url="broker", **tls(authority, node))).identifier(wire.NODE) for _ in range(2))
    theirs = access(Cluster(url="broker", **tls(authority, authority.issue("theirs")))).identifier(wire.NODE)
    secret = access(Cluster(url="broker", user="me", password_file=secret_file(tmp_path, "x"))).identifier(wire.NODE)
    assert mine == again
    assert len({mine, theirs, secret}) == 3
    assert all(re.fullmatch(rf"{wire.NODE}-[0-9a-f]{{32}}", it) for it in (mine, theirs, secret))
    assert access(Cluster(url="broker")).identifier(wire.NODE) == wire.NODE


def wrong(tmp_path: Path, authority: Authority, node: Pair) -> Iterator[tuple[dict[str, Any], str]]:
    """Configurations that are right as such, and cannot be done."""
    text, public, empty = tmp_path / "text", tmp_path / "public", tmp_path / "empty"
    for path, mode in ((text, 0o600), (public, 0o644), (empty, 0o600)):
        path.write_text("" if path == empty else "text")
        path.chmod(mode)
    nowhere = tmp_path / "nowhere"
    secured = tls(authority, node)
    yield {"ca": nowhere}, "cluster.ca: expected certificates in PEM"
    yield {"ca": text}, "cluster.ca: expected certificates in PEM"
    yield secured | {"certificate": text}, "cluster.certificate: expected a certificate and its key"
    yield secured | {"key": text}, "cluster.certificate: expected a certificate and its key"
    yield secured | {"key": public}, "cluster.key: expected a file of mode 0600"
    yield secured | {"key": nowhere}, "cluster.key: expected a readable file"
    yield {"user": "me", "password_file": nowhere}, "cluster.password_file: expected a readable file"
    yield {"user": "me", "password_file": public}, "cluster.password_file: expected a file of mode 0600"
    yield {"user": "me", "password_file": empty}, "cluster.password_file: expected a password"
    yield {"url": ""}, "cluster.url: expected a broker"


def test_what_cannot_be_done_is_refused_before_anything_is_connected(
    tmp_path: Path, authority: Authority, node: Pair
) -> None:
    for cluster, reason in wrong(tmp_path, authority, node):
        with pytest.raises(ClusterError, match=reason):
            access(Cluster(**{"url": "broker", **cluster}))


def test_a_node_without_an_identity_is_no_member() -> None:
    async def test() -> None:
        with pytest.raises(ClusterError, match=r"node\.id: expected 24 hexadecimal digits"):
            Member(Config(cluster=Cluster(url="broker")), ip_address(wire.ADDRESS), 1, lambda _: None)

    run(test)


# --- A real broker ------------------------------------------------------------------------------


def secured(authority: Authority, server: Pair) -> list[str]:
    """A broker that wants certificates, takes a user's name from them, and lets each node use its own topics only."""
    files = [f"cafile {authority.certificate}", f"certfile {server.certificate}", f"keyfile {server.key}"]
    return [*files, "require_certificate true", "use_identity_as_username true"]


@pytest.fixture
def tls_broker(tmp_path: Path, authority: Authority, server: Pair) -> Iterator[Mosquitto]:
    acl = tmp_path / "acl"
    acl.write_text("pattern readwrite nodes/%u/net/#\npattern read jobs/#\n")
    with mosquitto(tmp_path, *secured(authority, server), f"acl_file {acl}") as running:
        yield running


async def refused(subject: Subject) -> str:
    """Why there is no connection; there is none for as long as several attempts take."""
    await subject.until(lambda: bool(subject.member.status()["last_error"]))
    assert not subject.member.status()["connected"]
    return str(subject.member.status()["last_error"])


@needs_mosquitto
def test_certificates_of_both_sides(tls_broker: Mosquitto, tmp_path: Path, authority: Authority, node: Pair) -> None:
    async def test() -> None:
        settings = config(tmp_path / "state", tls_broker.port, query_timeout=1, **tls(authority, node))
        async with started(settings) as subject:
            await subject.connected()
            assert subject.member.status()["broker"].startswith("mqtts://127.0.0.1:")
            assert not await subject.member.resolve(ip_address(wire.RR)), "nobody answers"

    run(test)
    log = tls_broker.log.read_text()
    assert re.search(rf"Received PUBLISH from {wire.NODE}-[0-9a-f]{{32}} \(d0, q1, r0", log)
    assert "Denied PUBLISH" not in log


@needs_mosquitto
def test_a_broker_that_another_authority_vouches_for_hears_nothing(
    tls_broker: Mosquitto, tmp_path: Path, node: Pair
) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")

    async def test() -> None:
        async with started(config(tmp_path / "state", tls_broker.port, **tls(other, node))) as subject:
            assert "certificate verify failed" in await refused(subject)

    run(test)
    assert wire.NODE not in tls_broker.log.read_text()


@needs_mosquitto
def test_a_broker_with_another_name_hears_nothing(tmp_path: Path, authority: Authority, node: Pair) -> None:
    elsewhere = authority.issue("elsewhere", "DNS:elsewhere.example")

    async def test() -> None:
        with mosquitto(tmp_path, *secured(authority, elsewhere)) as broker:
            async with started(config(tmp_path / "state", broker.port, **tls(authority, node))) as subject:
                assert "certificate is not valid for '127.0.0.1'" in await refused(subject)
            assert wire.NODE not in broker.log.read_text()

    run(test)


@needs_mosquitto
def test_tls_is_never_given_up_for_a_broker_without_it(tmp_path: Path, authority: Authority, node: Pair) -> None:
    async def test() -> None:
        with mosquitto(tmp_path) as broker:
            async with started(config(tmp_path / "state", broker.port, **tls(authority, node))) as subject:
                assert await refused(subject)
            assert wire.NODE not in broker.log.read_text()

    run(test)


@needs_mosquitto
@pytest.mark.parametrize(("password", "welcome"), [("tr0ub4dor", True), ("hunter2", False)])
def test_user_and_password(tmp_path: Path, password: str, welcome: bool) -> None:
    subprocess.run(["mosquitto_passwd", "-b", "-c", tmp_path / "users", "me", "tr0ub4dor"], check=True)
    secret = secret_file(tmp_path, password)

    async def test() -> None:
        options = ("allow_anonymous false", f"password_file {tmp_path / 'users'}")
        with mosquitto(tmp_path, *options) as broker:
            settings = config(tmp_path / "state", broker.port, user="me", password_file=secret)
            async with started(settings) as subject:
                if welcome:
                    await subject.connected()
                else:
                    assert "Not authorized" in await refused(subject)
                assert password not in str(subject.member.status())

    run(test)


@contextmanager
def strict_nats(directory: Path) -> Iterator[int]:
    """A broker that refuses subscriptions, which mosquitto accepts and then leaves without messages; gives its port."""
    port, config_file = free_port(), directory / "nats.json"
    permissions = {"publish": ">", "subscribe": [f"nodes.{wire.NODE}.>", "$MQTT.>"]}
    settings = {
        "server_name": "test",
        "host": "127.0.0.1",
        "port": -1,
        "jetstream": {"store_dir": str(directory / "store")},
        "mqtt": {"host": "127.0.0.1", "port": port},
        "authorization": {"users": [{"user": "me", "password": "tr0ub4dor", "permissions": permissions}]},
    }
    config_file.write_text(json.dumps(settings))
    program = shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    assert program is not None
    process = subprocess.Popen([program, "-c", str(config_file)], stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def test_a_subscription_that_the_broker_refuses_is_said(tmp_path: Path) -> None:
    async def test() -> None:
        with strict_nats(tmp_path) as port:
            settings = config(tmp_path / "state", port, user="me", password_file=secret_file(tmp_path, "tr0ub4dor"))
            async with started(settings) as subject:
                await subject.connected()
                await subject.member.deployed(wire.JOB, 0, None, None)
                await subject.until(lambda: subject.member.status()["counters"].get("subscriptions_refused") == 3)
                refused = subject.member.status()["last_error"]
                assert any(it in refused for it in (f"jobs/{wire.JOB}/", topics.NODES, topics.EXPOSED))

    run(test)
