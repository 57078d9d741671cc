"""A process that is killed by itself: `python -m tests.environment.dying OPERATION AFTER [CONTAINER]`.

It runs the operation in its own network namespace, and dies after the given number of commands.
"""

import asyncio
import sys

from appliance.environment import EnvironmentManager, NetnsRef
from tests.environment.faults import Fault, kill
from tests.environment.settings import SERVICE, config


async def main(operation: str, after: int, container: str) -> None:
    """Does not return."""
    manager, fault = EnvironmentManager(config()), Fault(after, kill)
    if operation == "converge":
        manager.fault_point = fault
    await manager.converge()
    manager.fault_point = fault
    if operation == "attach":
        await manager.attach(SERVICE, 0, NetnsRef.by_name(container))
    elif operation == "detach":
        await manager.detach(SERVICE, 0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
