"""The shape of a system under test."""

import shutil
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from perf.topology import Path

WORKER = "worker"
"""Role of the processes that carry packets."""


@dataclass(frozen=True)
class Process:
    """A process of a system: its part in it, the node it runs on, its pid."""

    role: str
    node: str
    pid: int


class System(ABC):
    """A way to carry packets between the two nodes of `perf.topology`. `net.workspace` removes what it makes."""

    name: str
    """As given on the command line."""
    sentence: str
    """What it is."""
    programs: ClassVar[dict[str, str]] = {}
    """Programs that it needs, and the Debian packages that have them."""
    group = ""
    """Systems of one group are measured scenario by scenario in turn; the groups in turn, each repeat."""

    def missing(self) -> tuple[str, ...]:
        """Debian packages without which it cannot be measured."""
        lacking = (package for program, package in self.programs.items() if shutil.which(program) is None)
        return tuple(dict.fromkeys(lacking))

    @abstractmethod
    def set_up(self) -> Path:
        """Joins a client container on `CLIENT_NODE` with a server container on `SERVER_NODE`."""

    def active(self) -> AbstractContextManager[None]:
        """Holds around each sample of this system, and of no other: for what would disturb the others."""
        return nullcontext()

    def processes(self) -> list[Process]:
        """Its processes now; none where the kernel does the work."""
        return []

    def describe(self) -> dict[str, Any]:
        """What a reader of the result must know about how it was set up."""
        return {}
