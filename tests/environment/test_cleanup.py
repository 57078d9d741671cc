"""`cleanup` after a process that was killed at any command: of the node's own making, of a deployment, of its end."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance import cleanup
from appliance.config import Config
from tests.environment.dying import Dying, dying
from tests.environment.footprint import footprint
from tests.environment.netns import TUN, Netns
from tests.environment.settings import config

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def process() -> Iterator[Dying]:
    """Where operations run that are killed."""
    with dying() as made:
        yield made


def of(directory: Path) -> Config:
    """The configuration of `settings`, with directories of the test's own."""
    paths = {name: directory / name for name in ("runtime", "state", "cache")}
    document = {**config().model_dump(mode="json"), "paths": paths, "api": {"socket": directory / "api.sock"}}
    return Config.model_validate(document)


@pytest.fixture
def pair(make_netns: Callable[[], Netns]) -> tuple[Netns, Netns]:
    """Namespaces of a node and of a container, whose loopback is up as any container's is."""
    node, container = make_netns(), make_netns()
    container.ip("link", "set", "lo", "up")
    return node, container


@contextmanager
def tun(node: Netns) -> Iterator[None]:
    """The TUN device: in operation it is its descriptors', and ends with them."""
    node.ip("tuntap", "add", "dev", TUN, "mode", "tun")
    yield
    node.ip("link", "del", TUN)


@pytest.mark.parametrize("operation", ["converge", "attach"])
def test_after_any_command_everything_goes(
    pair: tuple[Netns, Netns], process: Dying, tmp_path: Path, operation: str, long: bool
) -> None:
    node, container = pair
    before = footprint(node), footprint(container)
    for after in itertools.count(1, 1 if long else 7):
        with tun(node):
            died = process.dies(node.name, operation, after, container.name)
            node.call(lambda: cleanup.everything(of(tmp_path), purge=True))
        assert (footprint(node), footprint(container)) == before, after
        if not died:
            break
    assert after >= 10


def test_in_the_middle_of_a_detachment(pair: tuple[Netns, Netns], process: Dying, tmp_path: Path) -> None:
    node, container = pair
    before = footprint(node), footprint(container)
    with tun(node):
        assert not process.dies(node.name, "attach", 100, container.name)
        assert process.dies(node.name, "detach", 1)
        node.call(lambda: cleanup.everything(of(tmp_path), purge=False))
    assert (footprint(node), footprint(container)) == before
