"""Namespaces that a test makes are removed after it."""

from collections.abc import Callable, Iterator

import pytest

from tests.environment import netns
from tests.environment.netns import TUN, Netns


@pytest.fixture
def make_netns() -> Iterator[Callable[[], Netns]]:
    """Makes empty namespaces."""
    netns.remove_abandoned()
    with netns.namespaces() as make:
        yield make


@pytest.fixture
def node(make_netns: Callable[[], Netns]) -> Netns:
    """A node's namespace, with the TUN link that the workers' supervisor opens before it converges."""
    namespace = make_netns()
    namespace.ip("link", "set", "lo", "up")
    namespace.ip("tuntap", "add", "dev", TUN, "mode", "tun")
    return namespace


@pytest.fixture
def container(make_netns: Callable[[], Netns]) -> Netns:
    """An empty container."""
    return make_netns()
