"""A hub for each test, and one with two members for those that leave them as they were."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environment import netns
from tests.supervisor.pair import Pair, pair_on
from tests.supervisor.world import World, world


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[World]:
    """An underlay on which nothing runs yet."""
    netns.remove_abandoned()
    with world(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two members of a cluster, and a client. Whoever changes it, changes it back."""
    netns.remove_abandoned()
    with world(tmp_path_factory.mktemp("pair")) as made:
        yield pair_on(made)
