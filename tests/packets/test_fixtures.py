"""Every fixture through the oracle and through the compiled path."""

from __future__ import annotations

from typing import Protocol

import pytest

from tests.dataplane.path import CompiledPath
from tests.oracle.compare import check_from_wire, comparable, pieces
from tests.oracle.model import Outcome, World
from tests.oracle.oracle import Oracle
from tests.oracle.virtio import Vnet
from tests.packets.fixture import DELIVERED, SENT, Fixture, Learn, Refuse, Step, Tun, Wire
from tests.packets.fixtures import THEMES

EVERY = [
    pytest.param(fixture, id=f"{theme}: {fixture.sentence}")
    for theme, fixtures in THEMES.items()
    for fixture in fixtures
]


class Path(Protocol):
    """Anything that does with packets what the appliance does."""

    def from_tun(self, vnet: bytes, packet: bytes) -> Outcome:
        """One read from the TUN."""

    def from_wire(self, source: tuple[str, int], payload: bytes, segment: int = 0) -> Outcome:
        """One read from the underlay."""

    def learn(self, world: World) -> None:
        """The tables are these from now on."""

    def refuse(self, address: str) -> None:
        """Nobody has this address."""

    def later(self, seconds: float) -> None:
        """So much time passes."""

    def run(self) -> Outcome:
        """What comes of what has happened."""


def play(path: Path, step: Step) -> Outcome:
    """What the path does with the step's input."""
    given = step.given
    if isinstance(given, Tun):
        return path.from_tun(given.vnet, given.packet)
    if isinstance(given, Wire):
        return path.from_wire(given.source, given.payload, given.segment)
    if isinstance(given, Learn):
        path.learn(given.world)
    elif isinstance(given, Refuse):
        path.refuse(given.address)
    else:
        path.later(given.seconds)
    return path.run()


@pytest.mark.parametrize("fixture", EVERY)
def test_oracle(fixture: Fixture) -> None:
    """The oracle gives exactly the expected bytes, in order."""
    oracle = Oracle(fixture.world)
    for step in fixture.steps:
        assert play(oracle, step) == step.outcome()


@pytest.mark.parametrize("fixture", EVERY)
def test_compiled_path(fixture: Fixture) -> None:
    """The compiled path gives the expected packets, merged as far as the fixture says."""
    path = CompiledPath(fixture.world)
    for step in fixture.steps:
        outcome = play(path, step)
        assert comparable(outcome) == comparable(step.outcome())
        if step.writes is not None:
            assert tuple(len(pieces(Vnet.unpack(vnet), data)) for vnet, data in outcome.tun) == step.writes
        if isinstance(step.given, Wire):
            for vnet, data in outcome.tun:
                check_from_wire(Vnet.unpack(vnet), data)


@pytest.mark.parametrize("fixture", EVERY)
def test_verdicts_fit_outputs(fixture: Fixture) -> None:
    """A fixture does not contradict itself: what is sent or delivered comes out, what is dropped does not."""
    for step in fixture.steps:
        assert bool(step.wire) == (SENT in step.verdicts)
        assert bool(step.tun) == (DELIVERED in step.verdicts)
        assert sum(step.writes or (len(step.tun),)) == len(step.tun)


def test_sentences_name_one_fixture_each() -> None:
    """A sentence is a name: no two fixtures share one."""
    sentences = [fixture.sentence for fixtures in THEMES.values() for fixture in fixtures]
    assert sorted(sentences) == sorted(set(sentences))
