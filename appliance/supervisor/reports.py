"""The supervisor's end of what workers report and are told about addresses (``appliance.dataplane.misses``).

One writer a word: the worker writes reports and their head, we their tail; we write refusals and their count. An order
of stores is enough, as each side publishes a count after what it counts; x86-64 and CPython's lock give that here, and
on arm64 the eventfd's system call does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from appliance import limits
from appliance.dataplane.misses import HEAD, RECORD, RECORDS, REFUSALS, REFUSED_AT, TAIL
from appliance.tables import layout
from appliance.tables.layout import IPAddress


class Reports:
    """One worker's reports; ``descriptor`` is readable when there are some."""

    def __init__(self, ring: Any, descriptor: int | None = None) -> None:
        """``descriptor``: the eventfd of a ring that is in use already, which is ours from now on."""
        self._ring = ring
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if descriptor is None else descriptor

    def take(self) -> Iterator[tuple[int, IPAddress]]:
        """Kind and address of each report since the last call. A worker that lies about their number gets nowhere."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        tail, head = int(self._ring[TAIL]), int(self._ring[HEAD])
        for number in range(max(tail, head - limits.MISS_RING), head):
            at = RECORDS + RECORD * (number & (limits.MISS_RING - 1))
            kind, hi, lo = (int(word) for word in self._ring[at : at + 3])
            yield kind, layout.address(hi, lo)
        self._ring[TAIL] = head

    def close(self) -> None:
        """Give up the descriptor."""
        os.close(self.descriptor)


def refuse(control: Any, address: IPAddress) -> None:
    """Tell a worker, in its control words, that nobody has an address. It is to be woken after that."""
    number = int(control[REFUSALS])
    at = REFUSED_AT + 2 * (number & (limits.REFUSAL_RING - 1))
    control[at], control[at + 1] = layout.words(address)
    control[REFUSALS] = number + 1
