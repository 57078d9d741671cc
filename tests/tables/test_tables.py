"""The shared tables: one writer, readers that never see half an entry."""

from __future__ import annotations

import ipaddress
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
import pytest
from numba import njit

from appliance.dataplane.native import fence, store_release
from appliance.tables import layout, publish, read, segment
from appliance.tables.buddy import Buddy
from appliance.tables.catalogue import Catalogue, Host, Node, Service, spread

V4, V6 = ipaddress.IPv4Address, ipaddress.IPv6Address
NODE = V4("192.0.2.1")
SMALL = layout.Capacity(hosts=64, services=32, choices=128)
LOCATED = np.dtype(read.LOCATIONS)
ANNOUNCED = [("announced", np.dtype(np.int64), 2)]


def located(publisher: publish.Publisher) -> tuple[Any, read.Tables]:
    """A reader's record over the tables, as a worker has it."""
    fd = publisher.descriptor()
    tables = read.attach(fd, publisher.capacity)
    os.close(fd)
    record = np.zeros(1, LOCATED)
    read.locate(record[0], tables)
    return record, tables


@njit
def host_of(records: Any, hi: int, lo: int) -> Any:
    return read.find_host(records[0], hi, lo)


@njit
def service_of(records: Any, hi: int, lo: int) -> Any:
    return read.find_service(records[0], hi, lo)


@njit
def torn(records: Any, announced: Any, me: int, hi: int, first_lo: int, count: int, rounds: int) -> Any:
    """Look ``count`` addresses up again and again; how many look-ups failed, and how many gave mixed entries.

    Announces the epoch before each round, as a worker does before each batch, and sleep at the end.
    """
    w = records[0]
    missing, mixed = 0, 0
    for _ in range(rounds):
        store_release(announced, me, read.epoch(w))
        fence()
        for i in range(count):
            lo = first_lo + (np.int64(i) << np.int64(56))
            found = read.find_host(w, hi, lo)
            if found < 0:
                missing += 1
                continue
            entry = read.hosts(w)[found]
            version = np.int64(entry.generation)
            if entry.address_lo != lo or entry.node_lo != version * 7 or entry.instance_lo != version * 11:
                mixed += 1
            if np.int64(entry.port) != version & 0xFFFF:
                mixed += 1
    store_release(announced, me, publish.ASLEEP)
    return missing, mixed


def host(number: int, **changes: Any) -> Host:
    address = V4(int(V4("10.18.0.0")) + number)
    return Host(**{"address": address, "node": NODE, "port": 50103, "owner": f"a.b.c.d.{number}", **changes})


def test_look_up_finds_what_was_published_in_both_families() -> None:
    publisher = publish.Publisher(SMALL)
    catalogue = Catalogue(publisher)
    v6 = V6("fc00::102")
    instance = V6("fdff::2")
    service = Service(V6("fdff:2000::30"), "rr", (v6,))
    catalogue.replace([host(2), Host(v6, V6("2001:db8::2"), 7, instance, local=True)], [service])
    record, tables = located(publisher)
    found = tables.hosts[host_of(record, *layout.words(v6))]
    assert layout.address(int(found["node_hi"]), int(found["node_lo"])) == V6("2001:db8::2")
    assert layout.address(int(found["instance_hi"]), int(found["instance_lo"])) == instance
    assert (found["port"], found["flags"]) == (7, layout.HOST_LOCAL)
    entry = tables.services[service_of(record, *layout.words(service.address))]
    choice = tables.choices[entry["choices"]]
    assert layout.address(int(choice["address_hi"]), int(choice["address_lo"])) == v6
    assert host_of(record, *layout.words("10.18.0.3")) == -1


def test_readers_cannot_map_the_tables_writable() -> None:
    publisher = publish.Publisher(SMALL)
    fd = publisher.descriptor()
    with pytest.raises(PermissionError):
        segment.arrays(fd, layout.sections(SMALL), writable=True)
    with pytest.raises(ValueError, match="read-only"):
        read.attach(fd, SMALL).hosts["port"] = 1
    with pytest.raises(PermissionError):  # sealed: cannot shrink under a reader
        os.ftruncate(publisher._fd, 4096)


def test_another_capacity_is_refused() -> None:
    publisher = publish.Publisher(SMALL)
    with pytest.raises(ValueError, match="expected"):
        read.attach(publisher.descriptor(), layout.Capacity(128, 32, 128))


def test_generation_follows_the_instance_and_not_its_node() -> None:
    publisher = publish.Publisher(SMALL)
    catalogue = Catalogue(publisher)
    record, tables = located(publisher)

    def generation() -> int:
        return int(tables.hosts[host_of(record, *layout.words(host(2).address))]["generation"])

    catalogue.replace([host(2)], [])
    first = generation()
    catalogue.replace([host(2, node=V4("192.0.2.9"))], [])
    assert generation() == first
    catalogue.replace([host(2, owner="a.b.c.d.99")], [])
    assert generation() != first


def test_replace_touches_only_what_differs() -> None:
    catalogue = Catalogue(publish.Publisher(SMALL))
    service = Service(V4("10.30.0.1"), "rr", (host(2).address,))
    catalogue.replace([host(2), host(3)], [service])
    assert catalogue.replace([host(2), host(3)], [service]).changed == []
    change = catalogue.replace([host(2), host(3, port=9)], [])
    assert change.changed == ["host 10.18.0.3", "service 10.30.0.1 removed"]


def test_retired_entries_wait_for_the_slowest_reader() -> None:
    epochs = [1]
    publisher = publish.Publisher(SMALL, lambda: epochs)
    catalogue = Catalogue(publisher)
    catalogue.replace([host(2)], [])
    catalogue.replace([host(2, port=1)], [])
    assert publisher.reclaim() == 1
    epochs[0] = publisher.epoch
    assert publisher.reclaim() == 0


def test_a_full_table_says_so_and_keeps_what_it_had() -> None:
    publisher = publish.Publisher(SMALL, lambda: [1])  # a reader that hangs
    catalogue = Catalogue(publisher)
    catalogue.replace([host(i) for i in range(40)], [])
    with pytest.raises(publish.TableFullError, match=r"tables.hosts: all 64 entries"):
        catalogue.replace([host(i, port=2) for i in range(40)], [])
    record, _ = located(publisher)
    assert all(host_of(record, *layout.words(host(i).address)) >= 0 for i in range(40))


def test_all_services_of_a_table_that_is_more_than_half_full_may_change_at_once() -> None:
    """The new choice lists have room only where old ones were, once a reader in a batch has begun another one."""
    announced = [1]

    def reader() -> list[int]:
        announced.append(publisher.epoch)
        return [announced.pop(0)]

    publisher = publish.Publisher(layout.Capacity(hosts=64, services=8192, choices=20_000), reader)
    catalogue = Catalogue(publisher)

    def services(first: int) -> list[Service]:
        backends = tuple(host(first + i).address for i in range(4))
        return [Service(V4("10.30.0.1") + i, "rr", backends) for i in range(4000)]

    catalogue.replace([host(i) for i in range(8)], services(0))
    catalogue.replace([host(i) for i in range(8)], services(4))
    assert {it.backends for it in catalogue.services.values()} == {tuple(host(4 + i).address for i in range(4))}


def test_churn_leaks_neither_entries_nor_choices() -> None:
    publisher = publish.Publisher(SMALL)
    catalogue = Catalogue(publisher)
    for step in range(300):
        hosts = [host(i, port=1 + step) for i in range(1, 31)]
        service = Service(V4("10.30.0.1"), "rr", tuple(h.address for h in hosts[: 1 + step % 30]))
        catalogue.replace(hosts, [service])
    catalogue.replace([], [])
    publisher.publish()
    assert (publisher._hosts.room, publisher._services.room, publisher._choices.used) == (64, 32, 0)


def _read_on(me: int, fd: int, announced_fd: int, stop: Event, result: Any) -> None:
    announced = segment.arrays(announced_fd, ANNOUNCED, writable=True)["announced"]
    tables = read.attach(fd, SMALL)
    record = np.zeros(1, LOCATED)
    read.locate(record[0], tables)
    hi, lo = layout.words("10.18.0.0")
    while not stop.is_set():
        missing, mixed = torn(record, announced, me, hi, lo, 16, 2_000)
        result[0] += missing
        result[1] += mixed
        result[2] += 32_000


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a race needs two CPUs")
def test_readers_never_see_half_an_entry() -> None:
    """A writer at full speed; readers in other processes check that all fields of an entry are of one version."""
    announced_fd = segment.create("announced", ANNOUNCED)
    announced = segment.arrays(announced_fd, ANNOUNCED, writable=True)["announced"]
    announced[:] = publish.ASLEEP
    publisher = publish.Publisher(SMALL, lambda: [int(epoch) for epoch in announced])
    hi, lo = layout.words("10.18.0.0")
    rows = np.zeros(16, layout.HOST)
    rows["address_hi"], rows["address_lo"] = hi, lo + (np.arange(16, dtype=np.int64) << 56)

    def write(version: int) -> None:
        for i in range(16):
            row = rows[i : i + 1]
            row["node_lo"], row["instance_lo"] = version * 7, version * 11
            row["generation"], row["port"] = version, version & 0xFFFF
            while True:
                try:
                    publisher.put_hosts(row)
                    break
                except publish.TableFullError:
                    time.sleep(0.0005)  # both readers are in the middle of a round
            publisher.publish()

    write(1)
    context = multiprocessing.get_context("fork")
    stop, result = context.Event(), context.Array("q", 3)
    fd = publisher.descriptor()
    readers = [context.Process(target=_read_on, args=(me, fd, announced_fd, stop, result)) for me in range(2)]
    record, _tables = located(publisher)
    torn(record, announced, 0, hi, lo, 1, 1)  # compile before the fork
    for reader in readers:
        reader.start()
    deadline, version = time.monotonic() + 3, 1
    while time.monotonic() < deadline or result[2] == 0:
        version += 1
        write(version)
    stop.set()
    for reader in readers:
        reader.join()
    assert version > 1_000
    assert result[2] > 100_000
    assert (result[0], result[1]) == (0, 0)


def test_a_million_hosts() -> None:
    count = 1_000_000
    publisher = publish.Publisher(layout.Capacity(hosts=1 << 20, services=16, choices=16))
    rows = np.zeros(count, layout.HOST)
    rows["address_hi"], rows["address_lo"] = 0, 0xFFFF0000 | (np.arange(count, dtype=np.int64) << 32)
    rows["generation"] = np.arange(count) + 1
    publisher.put_hosts(rows)
    publisher.publish()
    record, tables = located(publisher)
    for number in range(0, count, 9973):
        found = host_of(record, 0, 0xFFFF0000 | (number << 32))
        assert tables.hosts[found]["generation"] == number + 1
    assert host_of(record, 0, 0xFFFF0000 | (count << 32)) == -1


def test_weights_are_spread_evenly() -> None:
    assert spread([3, 1]) == [0, 0, 1, 0]
    assert spread([2, 2]) == [0, 1]
    assert spread([5, 0, 5]) == [0, 2]
    huge = spread([1_000_000, 1])
    assert len(huge) <= 4_097
    assert huge.count(1) == 1


def test_buddy_blocks_never_overlap_and_merge_again() -> None:
    buddy = Buddy(100)
    taken = [(buddy.allocate(size), size) for size in (1, 3, 8, 5, 16, 2)]
    places = [place for start, size in taken for place in range(start, start + size)]
    assert len(places) == len(set(places))
    assert max(places) < 100
    with pytest.raises(MemoryError):
        buddy.allocate(65)
    for start, _ in taken:
        buddy.free(start)
    assert buddy.used == 0
    assert buddy.allocate(64) == 0


@njit
def node_of(records: Any, hi: int, lo: int) -> Any:
    return read.find_node(records[0], hi, lo)


def test_nodes_come_change_and_go() -> None:
    publisher = publish.Publisher(SMALL)
    record, tables = located(publisher)
    known = Catalogue(publisher)
    near, far = V4("192.0.2.1"), V6("2001:db8::2")

    def entry(address: layout.IPAddress) -> Any:
        number = int(node_of(record, *layout.words(address)))
        return None if number < 0 else tables.nodes[number]

    known.replace_nodes([Node(near, 50103), Node(far, 50104, mtu=1500, ours=True)])
    found = entry(far)
    assert (found["port"], found["mtu"], found["flags"]) == (50104, 1500, layout.NODE_OURS)
    assert known.replace_nodes([Node(near, 50103), Node(far, 50104, mtu=1400)])
    assert not known.replace_nodes(list(known.nodes.values()))
    assert entry(far)["mtu"] == 1400
    known.replace_nodes([Node(near, 50103)])
    assert entry(far) is None
    assert entry(near) is not None
    assert list(known.nodes) == [near]
