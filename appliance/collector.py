"""Python's collector of cyclic garbage, beside tables that grow large.

A full collection walks every object that the collector knows: with 10,000 jobs half a second in which the event loop
stands still, and one comes each time that there is a quarter more of them, which is two thirds of the time that parsing
their answers takes. What lies in such tables forms no cycles: so the collector is told to leave alone what has come to
stay (`gc.freeze`). What is replaced later is freed as before, by its count.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class Settling:
    """Takes what comes to stay out of the collector's sight, each time that ``many`` more have come."""

    def __init__(self, many: int) -> None:
        self._many = many
        self._young = 0

    def came(self, count: int = 1) -> None:
        """So many more are there."""
        self._young += count
        if self._young >= self._many:
            self.settle()

    def settle(self) -> None:
        """Takes all that there is now out of the collector's sight."""
        self._young = 0
        gc.collect()
        gc.freeze()


@contextmanager
def aside(*, when: bool) -> Iterator[None]:
    """Keeps the collector off the many objects that the block makes, now and later."""
    if not when or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
