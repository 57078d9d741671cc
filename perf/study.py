"""What a measurement that is no comparison of samples yields: facts, and curves to draw. One file of JSON, as a
`Result`."""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from perf import environment


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Curve(_Record):
    """Points of one line, by its name in the legend."""

    name: str
    points: tuple[tuple[float, float], ...]


class Figure(_Record):
    """Lines in one coordinate system."""

    key: str
    title: str
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    curves: tuple[Curve, ...]


class Fact(_Record):
    """One number, as it is shown, with its unit."""

    what: str
    value: str


class Study(_Record):
    """A whole measurement; `name` is the subcommand that makes it."""

    version: int = 1
    name: str
    sentence: str
    started: datetime
    command: str
    machine: dict[str, Any]
    facts: tuple[Fact, ...]
    figures: tuple[Figure, ...] = ()

    def save(self, path: Path) -> None:
        """Writes the file. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Reads a file. Raises OSError, pydantic.ValidationError."""
        return cls.model_validate_json(path.read_bytes())

    @property
    def marks(self) -> tuple[str, str]:
        """Lines of a page between which this study is shown."""
        return f"<!-- study {self.name} -->\n", f"<!-- end of {self.name} -->\n"

    def markdown(self) -> str:
        """The command, the machine in a line, and the facts as a table."""
        about = f"{self.machine['cpus']} CPUs, {self.machine['cpu']}, Linux {self.machine['kernel']}"
        about += f", Python {self.machine['python']}, commit {self.machine['commit']}"
        rows = "".join(f"| {fact.what} | {fact.value} |\n" for fact in self.facts)
        return f"`{self.command}`, {self.started:%Y-%m-%d %H:%M} UTC, {about}\n\n| | |\n|---|--:|\n{rows}"

    def inserted(self, page: str) -> str:
        """A page with the text between this study's marks replaced. Raises ValueError for a page without them."""
        begin, end = self.marks
        before, found, rest = page.partition(begin)
        _old, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"expected the marks {begin.strip()} and {end.strip()}")
        return f"{before}{begin}{self.markdown()}{end}{after}"


def study(name: str, sentence: str, facts: dict[str, str], *figures: Figure) -> Study:
    """A study that has just been made here."""
    return Study(
        name=name,
        sentence=sentence,
        started=datetime.now(UTC).replace(microsecond=0),
        command=shlex.join(["python", "-m", "perf", *sys.argv[1:]]),
        machine=environment.machine(),
        facts=tuple(Fact(what=what, value=value) for what, value in facts.items()),
        figures=figures,
    )
