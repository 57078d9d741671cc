"""Processes that are killed by themselves: `python -m tests.environment.dying` forks one for each line that it reads.

    NAMESPACE OPERATION AFTER [CONTAINER]

The process runs the operation in that network namespace, and dies after the given number of commands. The answer is
a line with how it ended, as `os.waitstatus_to_exitcode` gives it.
"""

import asyncio
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

from pyroute2 import netns

from appliance.environment import EnvironmentManager, NetnsRef
from tests.environment.faults import Fault, kill
from tests.environment.netns import RUN
from tests.environment.settings import SERVICE, config

ROOT = Path(__file__).parent.parent.parent


class Dying:
    """The process that forks them, as a test sees it."""

    def __init__(self, process: Popen[str]) -> None:
        self._process = process

    def dies(self, node: str, operation: str, after: int, container: str = "") -> bool:
        """Runs an operation in a node's namespace; whether it came to the command to die after."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{node} {operation} {after} {container}\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert status in (0, -9), f"{operation}: status {status}"
        return status != 0


@contextmanager
def dying() -> Iterator[Dying]:
    """What forks processes that die; it starts once, and loads Python once."""
    start = [sys.executable, "-m", "tests.environment.dying"]
    with Popen(start, cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True) as process:
        yield Dying(process)
        process.kill()


async def main(operation: str, after: int, container: str = "") -> None:
    """Does not return, if the operation has so many commands."""
    manager, fault = EnvironmentManager(config()), Fault(after, kill)
    if operation == "converge":
        manager.fault_point = fault
    await manager.converge()
    manager.fault_point = fault
    if operation == "attach":
        await manager.attach(SERVICE, 0, NetnsRef.by_name(container))
    elif operation == "detach":
        await manager.detach(SERVICE, 0)


def run(node: str, operation: str, after: str, *container: str) -> int:
    """The forked process; its exit status, if it has one."""
    try:
        netns.setns(str(RUN / node), flags=0)
        asyncio.run(main(operation, int(after), *container))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os._exit(run(*line.split()))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
