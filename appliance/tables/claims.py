"""Which entry an address has, where several jobs may claim it: that of the first job by name, on every node alike.

Owned by whoever derives the tables (``supervisor.publication``). A job's entries are replaced as a whole, and what
comes back are the addresses whose entry may be another one now, with that entry; nothing else is looked at. No input or
output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from appliance.tables.layout import IPAddress

Entry = TypeVar("Entry")


class Claims(Generic[Entry]):
    """See the module. An address that one job claims, as nearly all are, costs one place in one dictionary."""

    def __init__(self) -> None:
        self._entries: dict[str, Mapping[IPAddress, Entry]] = {}
        self._owners: dict[IPAddress, str] = {}
        self._rivals: dict[IPAddress, set[str]] = {}

    def owner(self, address: IPAddress) -> str | None:
        """The job that has an address."""
        return self._owners.get(address)

    def entry(self, address: IPAddress) -> Entry | None:
        """The entry of the job that has an address."""
        owner = self._owners.get(address)
        return None if owner is None else self._entries[owner][address]

    def replace(self, job: str, entries: Mapping[IPAddress, Entry]) -> dict[IPAddress, Entry | None]:
        """These are all of a job's entries now; gives what each address that this touches has now."""
        before = self._entries.pop(job, None)
        if entries:
            self._entries[job] = entries
        if before is None:
            return {it: self._claim(it, job, entry) for it, entry in entries.items()}
        touched: dict[IPAddress, Entry | None] = {}
        for address in before.keys() - entries.keys():
            touched[address] = self._withdraw(address, job)
        for address, entry in entries.items():
            known = before.get(address)
            if known != entry:
                is_new = known is None
                touched[address] = self._claim(address, job, entry) if is_new else self.entry(address)
        return touched

    def _claim(self, address: IPAddress, job: str, entry: Entry) -> Entry | None:
        owner = self._owners.setdefault(address, job)
        if owner == job:
            return entry
        self._owners[address] = min(owner, job)
        self._rivals.setdefault(address, set()).add(max(owner, job))
        return self.entry(address)

    def _withdraw(self, address: IPAddress, job: str) -> Entry | None:
        rivals = self._rivals.get(address, set())
        if self._owners[address] != job:
            rivals.discard(job)
        elif rivals:
            self._owners[address] = min(rivals)
            rivals.discard(self._owners[address])
        else:
            del self._owners[address]
        if not rivals:
            self._rivals.pop(address, None)
        return self.entry(address)
