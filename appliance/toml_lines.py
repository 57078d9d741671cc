"""Where in a TOML text each key stands, so that an error about a value can name its line.

The standard library's parser keeps no positions, and the maintained third-party ones expose none. So the
text is cut into statements, and the same parser that read the file tells where each ends: a statement is
the fewest whole lines that parse. A table header sets the table of what follows; the keys of a statement
stand on its first line; an element of an array that spans lines stands on the line where the array,
closed there, first holds it. All of this runs only when there is an error to report.
"""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

Location = tuple[str | int, ...]

DEPTH_MAX = 3
"""Arrays inside arrays that may be open at a line's end; deeper, an element is found on a later line."""


class Lines:
    """Lines of the keys of a text that parses as TOML. Raises tomllib.TOMLDecodeError if it does not."""

    def __init__(self, text: str) -> None:
        tomllib.loads(text)
        self._line_of: dict[Location, int] = {}
        table: Location = ()
        for first, lines in _statements(text):
            statement = tomllib.loads("\n".join(lines))
            if lines[0].lstrip().startswith("["):
                table = self._enter(_header(statement), first)
            else:
                self._add(table, statement, first, lines)

    def of(self, loc: Location) -> int | None:
        """The line (from 1) of a key or an array's element, or of the nearest thing around it."""
        while loc and loc not in self._line_of:
            loc = loc[:-1]
        return self._line_of.get(loc)

    def _enter(self, table: Location, line: int) -> Location:
        """Notes a header. A table of an array gets the number of its elements so far as its index."""
        if table[-1] == 0:
            table = (*table[:-1], sum(known[:-1] == table[:-1] for known in self._line_of))
        for depth in range(1, len(table) + 1):
            self._line_of.setdefault(table[:depth], line)
        return table

    def _add(self, at: Location, value: Any, first: int, lines: list[str]) -> None:
        """Notes every key below `at` in one statement's value, and its arrays' elements."""
        if isinstance(value, dict):
            for key, inner in value.items():
                self._line_of.setdefault((*at, key), first)
                self._add((*at, key), inner, first, lines)
        elif isinstance(value, list):
            for index, line in enumerate(_element_lines(value, first, lines)):
                self._line_of[(*at, index)] = line


def _statements(text: str) -> Iterator[tuple[int, list[str]]]:
    """First line number and lines of each statement; comments and blank lines are none."""
    pending: list[str] = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        pending.append(line)
        if not _parses(pending):
            continue
        if tomllib.loads("\n".join(pending)):
            yield number - len(pending) + 1, pending
        pending = []


def _parses(lines: list[str]) -> bool:
    try:
        tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError:
        return False
    return True


def _header(statement: dict[str, Any]) -> Location:
    """`[a.b]` as `("a", "b")`, `[[a]]` as `("a", 0)`, from what the header alone parses to."""
    loc: list[str | int] = []
    inner: Any = statement
    while inner:
        step: str | int = 0 if isinstance(inner, list) else next(iter(inner))
        loc.append(step)
        inner = inner[step]
    return tuple(loc)


def _element_lines(array: list[Any], first: int, lines: list[str]) -> Iterator[int]:
    """The line of each element of the array that a statement's lines assign."""
    line = 0
    for index in range(len(array)):
        while line < len(lines) - 1 and _elements(lines[: line + 1]) <= index:
            line += 1
        yield first + line


def _elements(lines: list[str]) -> int:
    """How many elements a statement's array has after some of its lines; 0 if it cannot be closed there."""
    closings = (["]" * depth] for depth in range(1, DEPTH_MAX + 1))
    closed = next((lines + closing for closing in closings if _parses(lines + closing)), None)
    if closed is None:
        return 0
    value: Any = tomllib.loads("\n".join(closed))
    while isinstance(value, dict):
        value = next(iter(value.values()))
    return len(value)


def syntax_error(error: tomllib.TOMLDecodeError, text: str) -> tuple[int, str]:
    """Line (from 1) and reason of a syntax error, from the message `REASON (at line 3, column 5)`."""
    message = str(error)
    reason = re.sub(r" \(at .*\)$", "", message)
    place = re.search(r"\(at line (\d+), column \d+\)$", message)
    line = int(place[1]) if place else text.count("\n") + 1
    return line, reason[:1].lower() + reason[1:]
