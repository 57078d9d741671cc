"""One running manager for the tests of a module, and clusters of their own for those that break things."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.manager.processes import Cluster, Manager, cluster


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster for one test; nothing runs yet."""
    with cluster(tmp_path) as it:
        yield it


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with one manager for all tests that leave it as they found it, but for names of their own."""
    with cluster(tmp_path_factory.mktemp("cluster")) as it:
        yield it


@pytest.fixture(scope="package")
def manager(shared: Cluster) -> Manager:
    """The manager of the shared cluster."""
    return shared.manager()
