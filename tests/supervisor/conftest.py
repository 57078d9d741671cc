"""A hub for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environment import netns
from tests.supervisor.world import World, world


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[World]:
    """An underlay on which nothing runs yet."""
    netns.remove_abandoned()
    with world(tmp_path) as made:
        yield made
