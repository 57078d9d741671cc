"""The end of asyncio tasks."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

AGAIN_S: Final = 5.0
"""Seconds until a cancellation is said again: longer than any task's own farewell, which that would cut short."""


async def end(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancels tasks and waits until they have ended, whatever with.

    ``asyncio.wait_for`` before Python 3.12, in libraries too, swallows a cancellation that comes just as what it waits
    for is done (github.com/python/cpython/issues/86296). So it is said again until it was heard.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=AGAIN_S)
        await asyncio.gather(*done, return_exceptions=True)  # else asyncio reports errors that nobody looked at
