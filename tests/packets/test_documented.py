"""docs/behaviour.md names tests and themes of fixtures that exist, and leaves no theme out."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.packets.fixtures import THEMES

TEXT = (ROOT / "docs/behaviour.md").read_text()
TESTS = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))


def test_every_theme_is_named() -> None:
    assert set(THEMES) - set(re.findall(r"`([a-z]+)`", TEXT)) == set()


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_what_is_named_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)
