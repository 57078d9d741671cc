"""What pages show of committed result files, and that they show just that.

A block of a page lies between two marks, lines of HTML comment, or is a section of the page of figures. It is written
from files in `perf/results`, never by hand: so each number there has a file, and the file has the command that made
it. `make check` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from perf import report, sections
from perf.results import Result
from perf.study import Study

ROOT: Final = Path(__file__).parent.parent
RESULTS: Final = Path("perf/results")
README, BENCHMARKS, FIGURES = Path("README.md"), Path("docs/benchmarks.md"), Path("docs/figures/index.html")
STUDIES: Final = ("calibrate", "path", "flows", "stream", "tables", "resync", "naming", "latency", "loss", "storm")
SHORT: Final = ("tcp1", "tcp4", "udp64-flows", "rr", "open", "connect")
"""Scenarios of the README's table: what is faster than VXLAN, and what is slower."""


DETAILS: Final = ("memory then", "time of one")
"""Facts that are left out where studies stand beside each other."""


@dataclass(frozen=True)
class Block:
    """What stands between the marks of that name in a page, and the files that it is written from."""

    page: Path
    name: str
    files: tuple[Path, ...]
    render: Callable[[tuple[Path, ...]], str]
    between: Callable[[str, str, str], str] = report.between

    def inserted(self, page: str) -> str:
        """The page with this block as its files want it. Raises ValueError, OSError, pydantic.ValidationError."""
        return self.between(page, self.name, self.render(tuple(ROOT / it for it in self.files)))


def _comparison(files: tuple[Path, ...]) -> str:
    return report.markdown(Result.load(files[0]))


def _short(files: tuple[Path, ...]) -> str:
    return report.short(Result.load(files[0]), SHORT)


def _study(files: tuple[Path, ...]) -> str:
    return Study.load(files[0]).markdown()


def _section(files: tuple[Path, ...]) -> str:
    path = files[0]
    return sections.section(Study.load(path) if path.stem in STUDIES else Result.load(path))


def _beside(files: tuple[Path, ...]) -> str:
    """Studies of one kind, a column each: their commands, then the facts in which they differ, without DETAILS."""
    studies = {file.stem: Study.load(file) for file in files}
    commands = "\n".join(f"- {name}: `{it.command}`, commit {it.machine['commit']}" for name, it in studies.items())
    facts = {name: {fact.what: fact.value for fact in it.facts} for name, it in studies.items()}
    what = dict.fromkeys(fact for each in facts.values() for fact in each)
    cells = {it: [each.get(it, report.NOTHING) for each in facts.values()] for it in what}
    shown = {it: row for it, row in cells.items() if len(set(row)) > 1 and not any(word in it for word in DETAILS)}
    rows = "".join(f"| {it} | {' | '.join(row)} |\n" for it, row in shown.items())
    return f"{commands}\n\n| | {' | '.join(studies)} |\n|---|{'--:|' * len(studies)}\n{rows}"


def _storms(*names: str) -> tuple[Path, ...]:
    return tuple(RESULTS / f"storm-{name}.json" for name in names)


BLOCKS: Final = (
    Block(README, "speed", (RESULTS / "systems.json",), _short),
    Block(BENCHMARKS, "results", (RESULTS / "systems.json",), _comparison),
    Block(BENCHMARKS, "modes", (RESULTS / "modes.json",), _comparison),
    *(Block(BENCHMARKS, f"study {name}", (RESULTS / f"{name}.json",), _study) for name in STUDIES),
    Block(FIGURES, "systems compared", (RESULTS / "systems.json",), _section, sections.between),
    *(Block(FIGURES, name, (RESULTS / f"{name}.json",), _section, sections.between) for name in STUDIES),
    Block(BENCHMARKS, "study soak", (RESULTS / "soak.json",), _study),
    Block(BENCHMARKS, "storm and disk", _storms("5000", "sync"), _beside),
    Block(BENCHMARKS, "storm and managers", _storms("1manager", "2managers", "2brokers"), _beside),
    Block(BENCHMARKS, "storm and brokers", _storms("1broker", "3brokers", "3replicas"), _beside),
)


def write() -> None:
    """Writes all blocks of all pages. Raises ValueError, OSError, pydantic.ValidationError."""
    for block in BLOCKS:
        path = ROOT / block.page
        path.write_text(block.inserted(path.read_text()))


def differing() -> Iterator[str]:
    """Blocks that do not say what their files do. Raises ValueError, OSError, pydantic.ValidationError."""
    for block in BLOCKS:
        page = (ROOT / block.page).read_text()
        if block.inserted(page) != page:
            yield f"{block.page}: {block.name}: expected what {', '.join(map(str, block.files))} has"
