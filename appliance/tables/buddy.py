"""A buddy allocator for the choice lists: blocks of powers of two out of one array.

Owned by the writer. Freed blocks merge with their buddies, so churn does not fragment the array for ever.
"""

from __future__ import annotations


class Buddy:
    """Hands out ``[start, start + size)`` blocks of an array with ``capacity`` places."""

    def __init__(self, capacity: int) -> None:
        self._orders = max(1, capacity).bit_length()
        self._free: list[set[int]] = [set() for _ in range(self._orders + 1)]
        self._order_of: dict[int, int] = {}
        start = 0
        for order in range(self._orders, -1, -1):  # capacity as a sum of aligned powers of two
            if capacity & (1 << order):
                self._free[order].add(start)
                start += 1 << order

    def allocate(self, count: int) -> int:
        """Start of a free block of at least ``count`` places. Raises MemoryError if there is none."""
        order = max(0, count - 1).bit_length()
        for source in range(order, self._orders + 1):
            if self._free[source]:
                break
        else:
            raise MemoryError(f"no free block of {1 << order} places")
        start = self._free[source].pop()
        while source > order:
            source -= 1
            self._free[source].add(start + (1 << source))
        self._order_of[start] = order
        return start

    def reserve(self, start: int, count: int) -> None:
        """Take the block that ``allocate`` once gave for ``count`` places. Raises ValueError if it is not free."""
        order = max(0, count - 1).bit_length()
        outer = next((o for o in range(order, self._orders + 1) if start >> o << o in self._free[o]), None)
        if outer is None or start & ((1 << order) - 1):
            raise ValueError(f"block {start}: expected a free one of {1 << order} places")
        self._free[outer].remove(start >> outer << outer)
        while outer > order:
            outer -= 1
            half = start >> outer << outer
            self._free[outer].add(half ^ (1 << outer))
        self._order_of[start] = order

    def free(self, start: int) -> None:
        """Give back a block by its start."""
        order = self._order_of.pop(start)
        while order < self._orders and (start ^ (1 << order)) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)

    @property
    def used(self) -> int:
        """Places in blocks that are handed out."""
        return sum(1 << order for order in self._order_of.values())
