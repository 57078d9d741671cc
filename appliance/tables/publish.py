"""The writer of the shared tables.

``put_*`` and ``remove_*`` link and unlink entries, ``publish`` makes an epoch of them. Entries that were unlinked rest
until every reader has started a batch after that epoch; see ``appliance.tables`` for why. A reader that died or sleeps
announces ``ASLEEP`` and holds nothing up.

Not thread-safe: one writer, one thread.

A writer that dies at any instruction leaves tables that readers can go on with: an entry is complete before the one
word that links it is stored. So the next writer takes the memory over (``Publisher(inherited=…)``): what is linked is
in use, everything else is free as soon as every reader has begun a batch after the takeover (``is_quiet``).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numba import njit

from appliance.dataplane.native import release, store_release
from appliance.tables import layout, segment
from appliance.tables.buddy import Buddy
from appliance.tables.layout import IPAddress, IPNetwork
from appliance.tables.read import Tables, _find, mix

ASLEEP = (1 << 63) - 1  # announced by a reader that holds no reference
PORTION = 64  # rows linked before what they replace may be freed: a table with room for so many can change whole
PATIENCE_S = 0.02  # for readers to begin another batch, when room is wanted; one takes less than a millisecond


class TableFullError(Exception):
    """A table has no room; the message names the table, its capacity and the configuration key.

    ``placed``: how many of the rows, from the first on, are in the table nevertheless.
    """

    placed = 0


@njit(cache=True)
def _put(buckets, entries, mask, seed, rows, places, replaced):
    """Link each row at its place; ``replaced`` gets the place whose entry it supersedes, or -1."""
    for i in range(len(rows)):
        hi, lo, place = rows[i].address_hi, rows[i].address_lo, places[i]
        bucket = mix(hi, lo, seed) & mask
        entries[place] = rows[i]
        old = _find(buckets, entries, bucket, hi, lo)
        replaced[i] = old
        if old < 0:
            entries[place].next = buckets[bucket]
            store_release(buckets, bucket, place + 1)
        else:
            entries[place].next = entries[old].next
            _relink(buckets, entries, bucket, old, place + 1)


@njit
def _relink(buckets, entries, bucket, old, link):
    """Make whatever points at entry ``old`` point at ``link`` instead."""
    at = np.int64(buckets[bucket])
    if at == old + 1:
        store_release(buckets, bucket, link)
        return
    while np.int64(entries[at - 1].next) != old + 1:
        at = np.int64(entries[at - 1].next)
    release()
    entries[at - 1].next = link


@njit(cache=True)
def _remove(buckets, entries, mask, seed, hi, lo):
    """Unlink the entry of an address; give its place, or -1."""
    bucket = mix(hi, lo, seed) & mask
    old = _find(buckets, entries, bucket, hi, lo)
    if old >= 0:
        _relink(buckets, entries, bucket, old, np.int64(entries[old].next))
    return old


class _Entries:
    """Places of one hash table: which are free, and the links."""

    def __init__(self, name: str, buckets: Any, entries: Any, mask: int, seed: int) -> None:
        self.name, self._buckets, self._entries = name, buckets, entries
        self._mask, self._seed = np.int64(mask), np.int64(seed)
        self._free: list[int] = []
        self._fresh = 0  # from here on no place was ever used, so a large table costs nothing until it is filled

    def take_over(self) -> Any:
        """The places that are linked, in ascending order; all others become free. Raises ValueError for wrong links."""
        found: list[Any] = []
        links = np.asarray(self._buckets[self._buckets != 0], dtype=np.int64)
        while len(links):
            if links.max() > len(self._entries) or sum(map(len, found)) > len(self._entries):
                raise ValueError(f"tables.{self.name}: expected chains of entries, got links that lead nowhere")
            found.append(links - 1)
            links = self._entries["next"][links - 1].astype(np.int64)
            links = links[links != 0]
        places = np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)
        if len(np.unique(places)) != len(places):
            raise ValueError(f"tables.{self.name}: expected chains of entries, got one that is linked twice")
        self._fresh = int(places[-1]) + 1 if len(places) else 0
        self._free = np.setdiff1d(np.arange(self._fresh), places).tolist()
        return places

    def full(self) -> TableFullError:
        """What to raise when there is no room."""
        return TableFullError(f"tables.{self.name}: all {len(self._entries)} entries are in use or not yet free")

    @property
    def room(self) -> int:
        """How many places are free."""
        return len(self._free) + len(self._entries) - self._fresh

    def put(self, rows: Any) -> list[int]:
        """Insert or replace at most ``room`` rows; the places that fell out of use."""
        count = len(rows)
        places = self._take(count)
        replaced = np.empty(count, dtype=np.int64)
        _put(self._buckets, self._entries, self._mask, self._seed, rows, places, replaced)
        return [int(place) for place in replaced[replaced >= 0]]

    def _take(self, count: int) -> Any:
        used = self._free[max(0, len(self._free) - count) :]
        del self._free[len(self._free) - len(used) :]
        first, self._fresh = self._fresh, self._fresh + count - len(used)
        return np.concatenate([np.array(used, dtype=np.int64), np.arange(first, self._fresh, dtype=np.int64)])

    def remove(self, hi: int, lo: int) -> list[int]:
        """Unlink; the place that fell out of use, if there was one."""
        place = int(_remove(self._buckets, self._entries, self._mask, self._seed, np.int64(hi), np.int64(lo)))
        return [place] if place >= 0 else []

    def free(self, places: list[int]) -> None:
        """Take places back."""
        self._free += places


@dataclass(frozen=True)
class Inherited:
    """Copies of the rows that were linked when the tables were taken over; the choices of each service."""

    hosts: Any
    services: Any
    choices: list[Any]
    nodes: Any


class Publisher:
    """Creates the tables, or takes those of a writer that is gone, and is their only writer."""

    def __init__(
        self, capacity: layout.Capacity, readers: Callable[[], Iterable[int]] = tuple, inherited: int | None = None
    ) -> None:
        """``readers`` gives the epochs that the readers announced, ``ASLEEP`` for those that hold nothing.

        ``inherited``: the writable descriptor of existing tables, which is owned from now on. Raises ValueError if they
        have another layout or capacity, or are damaged; then nothing was changed.
        """
        self.capacity = capacity
        self._readers = readers
        self._fd = segment.create("edge-tables", layout.sections(capacity)) if inherited is None else inherited
        self._tables = Tables(**segment.arrays(self._fd, layout.sections(capacity), writable=True))
        if inherited is None:
            self._write_header()
        else:
            self._check_header()
        seed = int(self._tables.header[layout.H_SEED])
        tables, masks = self._tables, (layout.H_HOST_MASK, layout.H_SERVICE_MASK, layout.H_NODE_MASK)
        host_mask, service_mask, node_mask = (int(tables.header[mask]) for mask in masks)
        self._hosts = _Entries("hosts", tables.host_buckets, tables.hosts, host_mask, seed)
        self._services = _Entries("services", tables.service_buckets, tables.services, service_mask, seed)
        self._nodes = _Entries("nodes", tables.node_buckets, tables.nodes, node_mask, seed)
        self._choices = Buddy(capacity.choices)
        self._maglev = list(range(capacity.maglev - 1, -1, -1))
        self._retired: deque[tuple[int, Callable[[list[int]], None], list[int]]] = deque()
        self.inherited = None if inherited is None else self._take_over()
        """What the tables held when they were taken over; None if they are new."""

    def _check_header(self) -> None:
        """Raises ValueError unless the tables are what this version would have made."""
        header, ours = self._tables.header, np.zeros(layout.H_WORDS, dtype=np.int64)
        self._describe(ours)
        for word in (layout.H_MAGIC, layout.H_VERSION, layout.H_HOSTS, layout.H_HOST_MASK, layout.H_SERVICES,
                     layout.H_SERVICE_MASK, layout.H_CHOICES, layout.H_NODES, layout.H_NODE_MASK):  # fmt: skip
            if header[word] != ours[word]:
                raise ValueError(f"tables: expected layout version {layout.VERSION} and {self.capacity}")

    def _take_over(self) -> Inherited:
        tables = self._tables
        hosts, nodes = tables.hosts[self._hosts.take_over()], tables.nodes[self._nodes.take_over()]
        services = tables.services[self._services.take_over()]
        choices = []
        for start, count in zip(services["choices"].tolist(), services["count"].tolist(), strict=True):
            self._choices.reserve(start, max(1, count))
            choices.append(tables.choices[start : start + count].copy())
        used = set(_tables_of(services))
        self._maglev = [number for number in self._maglev if number not in used]
        self.publish()
        return Inherited(hosts, services, choices, nodes)

    def is_quiet(self) -> bool:
        """Whether every reader has begun a batch since the tables were taken over, so that nobody holds what was free
        by then. Nothing may be put before."""
        return min(self._readers(), default=ASLEEP) >= self.epoch

    def new_generation(self) -> int:
        """A generation that no entry of these tables ever had, whoever wrote it."""
        generation = int(self._tables.header[layout.H_GENERATION]) + 1
        self._tables.header[layout.H_GENERATION] = generation
        return generation

    def _write_header(self) -> None:
        header = self._tables.header
        self._describe(header)
        header[layout.H_SEED] = np.frombuffer(os.urandom(8), dtype=np.int64)[0]
        header[layout.H_EPOCH] = 1

    def _describe(self, header: Any) -> None:
        """The words that tell layout and capacity."""
        header[layout.H_HOSTS], header[layout.H_SERVICES] = self.capacity.hosts, self.capacity.services
        header[layout.H_HOST_MASK] = layout.buckets_for(self.capacity.hosts) - 1
        header[layout.H_SERVICE_MASK] = layout.buckets_for(self.capacity.services) - 1
        header[layout.H_CHOICES] = self.capacity.choices
        header[layout.H_NODES] = self.capacity.nodes
        header[layout.H_NODE_MASK] = layout.buckets_for(self.capacity.nodes) - 1
        header[layout.H_VERSION], header[layout.H_MAGIC] = layout.VERSION, layout.MAGIC

    @property
    def memory(self) -> int:
        """The writable descriptor, for whoever keeps it for the next writer."""
        return self._fd

    def descriptor(self) -> int:
        """A new read-only descriptor of the tables, for a reader. The caller closes it."""
        return segment.readonly(self._fd)

    def set_ranges(self, services: Iterable[IPNetwork], overlay: Iterable[IPNetwork] = ()) -> None:
        """Set the ranges of ServiceIPs and of the overlay; before the first reader attaches."""
        self._set_ranges("services", list(services), self._tables.ranges, layout.H_RANGES)
        self._set_ranges("overlay", list(overlay), self._tables.overlays, layout.H_OVERLAYS)

    def _set_ranges(self, name: str, networks: list[IPNetwork], ranges: Any, count: int) -> None:
        if len(networks) > layout.RANGES_MAX:
            raise TableFullError(f"network.{name}: expected at most {layout.RANGES_MAX} ranges, got {len(networks)}")
        for i, network in enumerate(networks):
            ranges[i] = layout.range_row(network)
        self._tables.header[count] = len(networks)

    def set_gateways(self, addresses: Iterable[IPAddress]) -> None:
        """Set this node's own addresses inside the overlay, from which it answers containers: the first of each family.

        A reader may see an old and a new half of an IPv6 address for one packet; nothing but the sender's name in an
        ICMP message depends on it.
        """
        header = self._tables.header
        found = {address.version: layout.words(address) for address in reversed(list(addresses))}
        _, header[layout.H_GATEWAY4] = found.get(4, (0, 0))
        header[layout.H_GATEWAY6_HI], header[layout.H_GATEWAY6_LO] = found.get(6, (0, 0))

    def put_hosts(self, rows: Any) -> None:
        """Insert or replace hosts; ``rows``: an array of ``layout.HOST`` with different addresses.

        Raises TableFullError; its ``placed`` says how many rows are in the table.
        """
        for chunk in self._chunks(self._hosts, rows):
            self._retire(self._hosts.free, self._hosts.put(chunk))

    def remove_host(self, hi: int, lo: int) -> None:
        """Remove a host, if it is there."""
        self._retire(self._hosts.free, self._hosts.remove(hi, lo))

    def put_nodes(self, rows: Any) -> None:
        """Insert or replace nodes; ``rows``: an array of ``layout.NODE`` with different addresses.

        Raises TableFullError; then the rows before the one that did not fit are in the table.
        """
        self._retire(self._nodes.free, [p for chunk in self._chunks(self._nodes, rows) for p in self._nodes.put(chunk)])

    def remove_node(self, hi: int, lo: int) -> None:
        """Remove a node, if it is there."""
        self._retire(self._nodes.free, self._nodes.remove(hi, lo))

    def put_services(self, rows: Any, choices: Any, slots: Sequence[Any] = ()) -> None:
        """Insert or replace ServiceIPs; ``choices``: an array of ``layout.CHOICE``, as many for each row as its
        ``count`` says, end to end; ``slots``: for each row its maglev table, or None.

        Raises TableFullError; its ``placed`` says how many rows are in the table.
        """
        placed, at, tables = 0, 0, list(slots) or [None] * len(rows)
        for chunk in self._chunks(self._services, rows):
            count = int(chunk["count"].sum())
            try:
                chunk["table"] = self._place_tables(tables[placed : placed + len(chunk)])
                self._place_choices(chunk, choices[at : at + count])
            except TableFullError as error:
                error.placed = placed
                raise
            self._retire_services(self._services.put(chunk))
            placed, at = placed + len(chunk), at + count

    def remove_service(self, hi: int, lo: int) -> None:
        """Remove a ServiceIP, if it is there."""
        self._retire_services(self._services.remove(hi, lo))

    def refuse_service(self) -> NoReturn:
        """Raise what a full service table raises."""
        raise self._services.full()

    def _chunks(self, entries: _Entries, rows: Any) -> Iterator[Any]:
        """Rows in portions that fit."""
        at = 0
        while at < len(rows):
            if not entries.room:
                self._make_room()
            if not entries.room:
                error = entries.full()
                error.placed = at
                raise error
            chunk = rows[at : at + min(entries.room, PORTION)]
            yield chunk
            at += len(chunk)

    def _place_choices(self, rows: Any, choices: Any) -> None:
        """Write the choices of all rows, or of none: what is not in the table must not keep places."""
        counts = rows["count"].astype(np.int64)
        starts: list[int] = []
        try:
            starts.extend(map(self._allocate_choices, counts.tolist()))
        except TableFullError:
            self._free_choices(starts)
            self._free_slots(_tables_of(rows))
            raise
        rows["choices"] = starts
        ends = np.cumsum(counts)
        self._tables.choices[np.repeat(np.array(starts) - ends + counts, counts) + np.arange(len(choices))] = choices

    def _allocate_choices(self, count: int) -> int:
        size = max(1, count)
        try:
            return self._choices.allocate(size)
        except MemoryError:
            self._make_room()
        try:
            return self._choices.allocate(size)
        except MemoryError as error:
            raise TableFullError(f"tables.backends: {error} of {self.capacity.choices}") from error

    def _place_tables(self, tables: Sequence[Any]) -> list[int]:
        """Write the maglev tables of all rows, or of none."""
        wanted = sum(table is not None for table in tables)
        if wanted > len(self._maglev):
            self._make_room()
        if wanted > len(self._maglev):
            raise TableFullError(f"tables.maglev: all {self.capacity.maglev} tables are in use or not yet free")
        return [layout.NO_TABLE if table is None else self._place_table(table) for table in tables]

    def _place_table(self, table: Any) -> int:
        number = self._maglev.pop()
        start = number * layout.MAGLEV_BLOCK
        self._tables.maglev[start : start + len(table)] = table
        return number

    def _retire_services(self, places: list[int]) -> None:
        rows = self._tables.services[places]
        self._retire(self._free_choices, [int(start) for start in rows["choices"]])
        self._retire(self._free_slots, _tables_of(rows))
        self._retire(self._services.free, places)

    def _free_choices(self, starts: list[int]) -> None:
        for start in starts:
            self._choices.free(start)

    def _free_slots(self, numbers: list[int]) -> None:
        self._maglev += numbers

    def _retire(self, free: Callable[[list[int]], None], places: list[int]) -> None:
        if places:
            self._retired.append((self.epoch, free, places))

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._tables.header[layout.H_EPOCH])

    def publish(self) -> int:
        """Begin a new epoch, and free what no reader can hold any more. Gives the new epoch."""
        store_epoch(self._tables.header, np.int64(self.epoch + 1))
        self.reclaim()
        return self.epoch

    def _make_room(self) -> None:
        """Begin another epoch, and wait a little until what was retired before is free."""
        self.publish()
        end = time.monotonic() + PATIENCE_S
        while self.reclaim() and time.monotonic() < end:
            time.sleep(PATIENCE_S / 40)

    def reclaim(self) -> int:
        """Free retired entries that no reader can hold; gives how many still rest."""
        oldest = min(self._readers(), default=ASLEEP)
        while self._retired and self._retired[0][0] < min(oldest, self.epoch):
            _, free, places = self._retired.popleft()
            free(places)
        return sum(len(places) for _, _, places in self._retired)

    def close(self) -> None:
        """Give up the descriptor; mappings of readers stay valid."""
        os.close(self._fd)


def _tables_of(rows: Any) -> list[int]:
    """Numbers of the maglev tables of service rows."""
    return [int(number) for number in rows["table"] if number != layout.NO_TABLE]


@njit(cache=True)
def store_epoch(header, epoch):
    """Announce an epoch after all that was written before."""
    store_release(header, layout.H_EPOCH, epoch)
