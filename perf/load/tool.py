"""Starts one end of a load in a namespace, waits until it is ready, lets it go, and takes its result."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import perf
from appliance.lab import processes
from perf import net

START_TIMEOUT = 90.0
"""Seconds until an end is ready; its first start on a machine compiles."""
SLACK = 20.0
"""Seconds that a result may take."""
SAID = 2000
"""Characters of its last words that an error repeats."""
ROOT = Path(perf.__file__).parents[1]


class ToolError(RuntimeError):
    """One end of a load failed; `str()` has what it said."""


class Tool:
    """A process in a namespace. It is marked as the lab's and ends with the block, so that none is left
    behind."""

    def __init__(self, namespace: str, *argv: str, lab: str = net.LAB) -> None:
        """Starts a command. Raises OSError."""
        self._name = f"{namespace}: {' '.join(argv)}"
        self._process = subprocess.Popen(
            processes.inside(namespace, argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is this process's, which then ends its tools in order
            env={**processes.environment(lab), "PYTHONPATH": str(ROOT)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def expect(self, word: bytes) -> Self:
        """Waits until the process has printed a word. Raises ToolError."""
        deadline, said = time.monotonic() + START_TIMEOUT, b""
        while word not in said:
            some = self._read(deadline - time.monotonic())
            if not some:
                raise self._failure(f"expected {word.decode()!r}")
            said += some
        return self

    def _read(self, seconds: float) -> bytes:
        """What the process prints next; nothing if it ends or takes longer."""
        output = cast(IO[bytes], self._process.stdout)
        readable, _, _ = select.select([output], [], [], max(0.0, seconds))
        return os.read(output.fileno(), 4096) if readable else b""

    def go(self) -> Self:
        """Lets a process that waits for it begin. Raises ToolError."""
        stdin = cast(IO[bytes], self._process.stdin)
        try:
            stdin.write(b"go\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failure("expected it to wait") from None
        return self

    def result(self, seconds: float) -> dict[str, Any]:
        """Waits for the end of a load of so many seconds; the JSON that was printed. Raises ToolError."""
        try:
            output, _errors = self._process.communicate(timeout=seconds + SLACK)
            return dict(json.loads(output))
        except subprocess.TimeoutExpired:
            raise self._failure(f"expected an end within {seconds + SLACK:g} s") from None
        except ValueError:
            raise self._failure("expected JSON") from None

    def _failure(self, expected: str) -> ToolError:
        """Ends the process; the error with the last that it said."""
        self._process.kill()
        output, errors = self._process.communicate()
        said = (errors or output).decode(errors="replace").strip()[-SAID:]
        return ToolError(f"{self._name}: {expected}, got {said!r}")


def end(namespace: str, *argv: str, lab: str = net.LAB) -> Tool:
    """One of the ends in `perf.load`, by its name and arguments. Raises OSError."""
    return Tool(namespace, sys.executable, "-m", "perf.load", *argv, lab=lab)
