"""What a writer that is gone left in the tables, by address, until it is confirmed or given up.

Owned by the catalogue; no input or output. It holds copies of the rows as they were at the takeover. An entry that was
confirmed, or written anew, is forgotten here; what is left in the end belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from appliance.tables import layout
from appliance.tables.layout import IPAddress
from appliance.tables.publish import Inherited


class Rows:
    """Rows of one table, by address. ``placing``: fields that say where an entry lies and not what it means."""

    def __init__(self, rows: Any, placing: tuple[str, ...]) -> None:
        self._rows = rows
        self._placing = placing
        self.at = {layout.address(int(row["address_hi"]), int(row["address_lo"])): i for i, row in enumerate(rows)}

    def row(self, address: IPAddress) -> Any:
        """The row of an address, None if there is none."""
        at = self.at.get(address)
        return None if at is None else self._rows[at]

    def numbers(self, field: str) -> dict[IPAddress, int]:
        """A field of all rows."""
        return {address: int(self._rows[field][at]) for address, at in self.at.items()}

    def carry_over(self, field: str, addresses: Collection[IPAddress], rows: Any) -> None:
        """Give new rows that have no value in a field the one that is in the tables; the addresses are forgotten."""
        if not self.at:
            return
        for i, address in enumerate(addresses):
            at = self.at.pop(address, None)
            if at is not None and not rows[i][field]:
                rows[i][field] = self._rows[at][field]

    def confirm(self, addresses: Collection[IPAddress], rows: Any) -> set[IPAddress]:
        """Forget some addresses; gives those whose entry is in the tables as these rows say."""
        if not self.at:
            return set()
        found = [(address, i, self.at.pop(address)) for i, address in enumerate(addresses) if address in self.at]
        new, old = rows[[i for _, i, _ in found]].copy(), self._rows[[at for _, _, at in found]].copy()
        for field in self._placing:
            new[field] = old[field] = 0
        return {address for (address, _, _), same in zip(found, new == old, strict=True) if same}


class Legacy:
    """See the module; nothing if there was no such writer."""

    def __init__(self, inherited: Inherited | None) -> None:
        held = inherited or Inherited(
            np.empty(0, layout.HOST), np.empty(0, layout.SERVICE), [], np.empty(0, layout.NODE)
        )
        self.hosts = Rows(held.hosts, ("next",))
        self.services = Rows(held.services, ("next", "choices", "table"))
        self.nodes = Rows(held.nodes, ("next",))
        self._choices = held.choices

    def offered(self, address: IPAddress) -> tuple[int, set[IPAddress]] | None:
        """A ServiceIP's generation, and whom it is given to; None if it is not known."""
        row = self.services.row(address)
        if row is None:
            return None
        places = self._choices[self.services.at[address]]
        return int(row["generation"]), {layout.address(int(it["address_hi"]), int(it["address_lo"])) for it in places}

    def confirm_services(self, services: Collection[IPAddress], rows: Any, places: Any) -> set[IPAddress]:
        """Forget some ServiceIPs; gives those that are in the tables as these rows and their choices say."""
        if not self.services.at:
            return set()
        ends = np.cumsum(rows["count"], dtype=np.int64).tolist()
        known = {
            address: np.array_equal(places[end - count : end], self._choices[self.services.at[address]])
            for address, end, count in zip(services, ends, rows["count"].tolist(), strict=True)
            if address in self.services.at
        }
        return {address for address in self.services.confirm(services, rows) if known[address]}

    def left(self) -> Mapping[str, set[IPAddress]]:
        """Addresses that nobody has confirmed yet, by table."""
        return {"hosts": set(self.hosts.at), "services": set(self.services.at), "nodes": set(self.nodes.at)}

    def forget(self) -> tuple[set[IPAddress], set[IPAddress], set[IPAddress]]:
        """The addresses that are left, hosts, services and nodes, for the last time."""
        left = self.left()
        for rows in (self.hosts, self.services, self.nodes):
            rows.at.clear()
        return left["hosts"], left["services"], left["nodes"]
