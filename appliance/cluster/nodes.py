"""What a manager of ours retains, as this node has heard it: the cluster's nodes, the exposed jobs. No input or output.

*Owned* by the session. A manager retains one message a node, or job, and an empty one for one that is gone. What was
removed while there was no connection is not told afterwards: so a connection begins with all nodes in doubt, and those
that are not heard of again within ``SETTLE`` seconds are dropped. An existing manager has no such list: it stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Generic, TypeVar

Entry = TypeVar("Entry")

SETTLE: Final = 30.0
"""Seconds after a connection's begin in which the broker delivers what is retained: much more than 5,000 nodes take."""


class Retained(Generic[Entry]):
    """See the module."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._doubted: set[str] = set()

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Entries by name."""
        return self._entries

    def put(self, name: str, entry: Entry | None) -> frozenset[str]:
        """An entry is there, or gone (None); gives those that are different now."""
        self._doubted.discard(name)
        if self._entries.get(name) == entry:
            return frozenset()
        if entry is None:
            del self._entries[name]
        else:
            self._entries[name] = entry
        return frozenset((name,))

    def doubt(self) -> None:
        """A connection begins."""
        self._doubted = set(self._entries)

    def settle(self) -> frozenset[str]:
        """Drops those that are still in doubt, and gives them."""
        gone, self._doubted = frozenset(self._doubted), set()
        for name in gone:
            del self._entries[name]
        return gone
