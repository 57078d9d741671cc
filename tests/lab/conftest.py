"""One lab for all tests that only use it; tests that break or vary a lab build their own."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.lab import lifecycle
from appliance.lab.files import ROOT as LABS
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import Spec
from appliance.naming import resolv
from tests.lab.helpers import NOTHING, leftovers

Build = Callable[..., Lab]

SHARED, VARIED, BROKEN, CHANGING, NARROW = (f"{letter}{os.getpid()}" for letter in "efghi")
"""Names of this run's labs: the one that all tests use, those that single tests build, the one that some change, and
the one with a narrow underlay."""


@pytest.fixture(scope="session", autouse=True)
def no_labs_of_killed_runs() -> None:
    """Removes the labs of test runs that were killed; their names tell the process."""
    found = [*LABS.glob("[efghi]*"), *resolv.DIRECTORY.glob("[efghi]*")] if os.geteuid() == 0 else []
    for name in sorted({it.name.partition("-")[0] for it in found}):
        run = re.fullmatch(r"[efghi]([0-9]+)", name)
        if run is not None and not Path("/proc", run[1]).exists():
            lifecycle.down(name)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two nodes with two workers each, an instance of the demo service on each."""
    try:
        yield lifecycle.up(Spec(name=SHARED, workers=(2,)))
    finally:
        lifecycle.down(SHARED)
    assert leftovers(SHARED) == NOTHING


@pytest.fixture(scope="session")
def three() -> Iterator[Lab]:
    """Three nodes with a worker each, an instance of the demo service on each. Whoever changes it, changes it back."""
    try:
        yield lifecycle.up(Spec(name=CHANGING, nodes=3, instances=3, workers=(1,)))
    finally:
        lifecycle.down(CHANGING)
    assert leftovers(CHANGING) == NOTHING


@pytest.fixture
def build() -> Iterator[Build]:
    """Builds a lab of the wanted kind for one test."""

    def up(**spec: Any) -> Lab:
        return lifecycle.up(Spec(name=VARIED, **spec))

    try:
        yield up
    finally:
        lifecycle.down(VARIED)
    assert leftovers(VARIED) == NOTHING
