"""The shape of a system under test."""

from dataclasses import dataclass
from typing import Any, Protocol

from perf.topology import Path

WORKER = "worker"
"""Role of the processes that carry packets."""


@dataclass(frozen=True)
class Process:
    """A process of a system: its part in it, the node it runs on, its pid."""

    role: str
    node: str
    pid: int


class System(Protocol):
    """A way to carry packets between the two nodes of `perf.topology`. `net.workspace` removes what it
    makes."""

    @property
    def name(self) -> str:
        """As given on the command line."""

    @property
    def sentence(self) -> str:
        """What it is."""

    def set_up(self) -> Path:
        """Joins a client container on `CLIENT_NODE` with a server container on `SERVER_NODE`."""

    def processes(self) -> list[Process]:
        """Its processes now; none where the kernel does the work."""

    def describe(self) -> dict[str, Any]:
        """What a reader of the result must know about how it was set up."""
