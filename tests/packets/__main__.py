"""Print the list of behaviours: python -m tests.packets [--bytes] [THEME ...]"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tests.packets.fixture import Fixture, Learn, Step, Tun, Wire
from tests.packets.fixtures import THEMES


def lines(fixture: Fixture, with_bytes: bool) -> Iterator[str]:
    """The sentence, and the bytes of its steps if asked for."""
    yield f"  {fixture.sentence}"
    for step in fixture.steps if with_bytes else ():
        yield from step_lines(step)


def step_lines(step: Step) -> Iterator[str]:
    """What goes in, the verdict, what comes out."""
    given = step.given
    if isinstance(given, Tun):
        yield f"    tun    {given.vnet.hex()} {given.packet.hex()}"
    elif isinstance(given, Wire):
        yield f"    wire   {given.source[0]} {given.segment} {given.payload.hex()}"
    elif isinstance(given, Learn):
        yield "    learn  other tables"
    else:
        yield f"    {given}"
    yield f"    =      {' '.join(step.verdicts)}"
    yield from (f"      wire {ip} {port} {packet.hex()}" for ip, port, packet in step.wire)
    yield from (f"      tun  {packet.hex()}" for packet in step.tun)
    yield from (f"      told {packet.hex()}" for packet in step.replies)


def main(arguments: list[str]) -> None:
    """Print the themes that are named, or all."""
    themes = [argument for argument in arguments if argument in THEMES]
    for theme in themes or THEMES:
        print(theme)
        for fixture in THEMES[theme]:
            print("\n".join(lines(fixture, "--bytes" in arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
