"""An upgrade to other code in another place, under traffic; a version that cannot read what runs; and the way back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.environment.netns import Netns
from tests.supervisor.pair import CLIENTS, ONE
from tests.supervisor.sockets import connect, round_trips, say, tcp_echo, udp_server
from tests.supervisor.test_handover import workers
from tests.supervisor.versions import PACKET_PATH, SUPERVISOR, TABLES, installed, lent
from tests.supervisor.world import READY_S, Node, World, ready, until

pytestmark = pytest.mark.root

JOB, RR = "app.ns.web.test", "10.30.30.30"
OURS, OTHER_SUPERVISOR, OTHER_PATH, OTHER_TABLES = "ours", "9.1.0", "9.2.0", "9.3.0"
CHANGES = {
    OTHER_SUPERVISOR: (SUPERVISOR, 'log.info("ready",', 'log.info("ready, of another version",'),
    OTHER_PATH: (PACKET_PATH, '"""', '"""Another packet path. '),
    OTHER_TABLES: (TABLES, "VERSION: Final = ", "VERSION: Final = 1"),
}


@contextmanager
def answered(client: Netns, seconds: float = 0.2) -> Iterator[None]:
    """Every datagram is answered all the time."""
    done, failures = threading.Event(), []

    def ask() -> None:
        try:
            while not done.is_set():
                round_trips(client, RR, seconds)
        except OSError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        done.set()
        asking.join()
    assert failures == []


def upgrade(node: Node, environment: dict[str, str]) -> None:
    """As `systemctl restart` does it once a link names the new version."""
    assert node.stop(signal.SIGUSR2) == 0
    node.environment = environment
    node.start()
    until(lambda: node.api.status()["naming"]["ready"], "its resolver has taken over", READY_S)


def refused(node: Node, environment: dict[str, str]) -> str:
    """The last words of a version that does not start."""
    assert node.stop(signal.SIGUSR2) == 0
    node.environment = environment
    node.launch()
    assert node.popen is not None
    assert node.popen.wait(READY_S) == 1
    return node.log.read_text().splitlines()[-1]


def test_other_code_takes_over_or_says_why_not(hub: World, tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("five starts of a supervisor: only with --long")
    manager, cache = hub.manager(), tmp_path / "cache"
    manager.deploy(JOB, 1, service_ips={"rr": {"v4": RR}})
    manager.deploy(CLIENTS, 1)
    versions = {name: installed(tmp_path, name, *change) for name, change in CHANGES.items()}
    for environment in ({}, *versions.values()):
        lent(cache, environment)
    node = hub.member(ONE, paths={"cache": str(cache)}, workers={"count": 2}).start()
    ready(node)
    server, client = hub.container(), hub.container()
    for job, container in ((JOB, server), (CLIENTS, client)):
        node.api.attach(job, 0, {"netns": container.name})
    until(lambda: node.api.need(JOB), "the service is known")
    with tcp_echo(server), udp_server(server), connect(client, RR)[0] as connection, answered(client):
        first = workers(node)
        upgrade(node, versions[OTHER_SUPERVISOR])
        assert node.api.status()["node"]["version"] == OTHER_SUPERVISOR
        assert "ready, of another version" in node.log.read_text()
        assert workers(node) == first, "they go on as they are"
        assert say(connection, b"one") == b"one"

        said = refused(node, versions[OTHER_TABLES])
        expected = f"the workers that run are of version {OTHER_SUPERVISOR}, whose memory this version ({OTHER_TABLES})"
        assert expected in said
        assert "cannot read: end them with `appliance cleanup --processes`, and connections with them" in said
        assert say(connection, b"two") == b"two", "they go on without a supervisor"

        node.environment = versions[OTHER_SUPERVISOR]
        node.start()
        assert workers(node) == first, "the way back finds them"

        upgrade(node, versions[OTHER_PATH])
        until(lambda: not set(workers(node)) & {0, *first}, "one by one they become workers of the other path", READY_S)
        assert "changed: the packet path" in node.log.read_text()
        assert say(connection, b"three") == b"three"

        upgrade(node, {})
        assert say(connection, b"four") == b"four"
