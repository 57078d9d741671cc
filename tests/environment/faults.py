"""Failures at a chosen command of a plan."""

import os
import signal
from collections.abc import Callable

from appliance.environment.plan import Command, describe


class Fault:
    """Counts commands, and acts after the given one."""

    def __init__(self, after: int, act: Callable[[Command], None]) -> None:
        self._after, self._act = after, act
        self._count = 0

    @property
    def hit(self) -> bool:
        """Whether the plan had as many commands."""
        return self._count >= self._after

    def __call__(self, command: Command) -> None:
        self._count += 1
        if self._count == self._after:
            self._act(command)


def fail(command: Command) -> None:
    """As the kernel fails."""
    raise OSError(5, f"injected after {describe(command)}")


def kill(_: Command) -> None:
    """As an operator, or the kernel without memory, kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def nothing(_: Command) -> None:
    """All goes well."""
