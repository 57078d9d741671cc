"""Two members of a cluster for all tests with real runtimes, and the file system of their containers."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environment import netns
from tests.supervisor.pair import Pair, pair_on
from tests.supervisor.world import world


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Whoever changes it, changes it back."""
    netns.remove_abandoned()
    with world(tmp_path_factory.mktemp("runtimes")) as made:
        yield pair_on(made)


@pytest.fixture(scope="session")
def busybox() -> Path:
    """A busybox that needs no library."""
    path = shutil.which("busybox")
    said = subprocess.run(["ldd", path], capture_output=True, text=True).stderr if path else "none"
    if path is None or "not a dynamic executable" not in said:
        pytest.skip("needs a static busybox (busybox-static)")
    return Path(path)
