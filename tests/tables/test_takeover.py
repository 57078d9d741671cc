"""A writer that ended, or was killed at any instruction, leaves tables that the next one takes over as they are."""

from __future__ import annotations

import os
import random
import signal
import time
from ipaddress import ip_address

import numpy as np
import pytest

from appliance.tables import layout, publish
from appliance.tables.buddy import Buddy
from appliance.tables.catalogue import Catalogue, Host, Node, Service

NODE = ip_address("192.0.2.1")
SMALL = layout.Capacity(hosts=64, services=32, choices=128, maglev=8)
HOSTS = [
    Host(ip_address(f"10.18.0.{i}"), NODE, 50103, ip_address(f"10.30.0.{i}"), i % 2 == 0, f"web.{i}", i == 3)
    for i in range(2, 12)
]
SERVICES = [
    Service(ip_address("10.30.1.1"), "rr", tuple(host.address for host in HOSTS[:3])),
    Service(ip_address("10.30.1.2"), "maglev", tuple(host.address for host in HOSTS), (2,) * len(HOSTS)),
    Service(ip_address("fdff::3"), "closest", tuple(host.address for host in HOSTS[:2]), near=1),
]


def rows(publisher: publish.Publisher) -> dict[str, bytes]:
    """All that readers see, but for the header."""
    tables = publisher._tables._asdict()
    return {name: array.tobytes() for name, array in tables.items() if name != "header"}


def successor(publisher: publish.Publisher) -> tuple[publish.Publisher, Catalogue]:
    """The next writer of the same memory."""
    taken = publish.Publisher(publisher.capacity, inherited=os.dup(publisher.memory))
    assert taken.is_quiet()
    return taken, Catalogue(taken)


@pytest.fixture
def before() -> tuple[publish.Publisher, Catalogue]:
    publisher = publish.Publisher(SMALL)
    catalogue = Catalogue(publisher)
    catalogue.replace(HOSTS, SERVICES)
    catalogue.replace(HOSTS[1:], SERVICES)  # so that there are gaps
    catalogue.replace(HOSTS, SERVICES[1:])
    catalogue.replace_nodes([Node(NODE, 50103, 1500, ours=True)])
    return publisher, catalogue


def test_what_is_wanted_again_is_not_written_again(before: tuple[publish.Publisher, Catalogue]) -> None:
    publisher, _ = before
    was = rows(publisher)
    taken, catalogue = successor(publisher)
    told: list[Host | None] = []
    catalogue.on_host = lambda _, after: told.append(after)
    catalogue.replace(HOSTS, SERVICES[1:])
    catalogue.replace_nodes([Node(NODE, 50103, ours=True)])  # its path is not measured yet
    assert catalogue.disinherit() == 0
    now = rows(taken)
    del was["nodes"], now["nodes"], was["node_buckets"], now["node_buckets"]
    assert now == was
    assert taken._tables.nodes["mtu"].max() == 1500
    assert sorted(told, key=str) == sorted(HOSTS, key=str)


def test_another_instance_at_an_address_is_another_generation_and_no_old_one(
    before: tuple[publish.Publisher, Catalogue],
) -> None:
    publisher, old = before
    old.replace(HOSTS[:4], ())  # generations that no row shows any more
    highest = int(publisher._tables.header[layout.H_GENERATION])
    _, catalogue = successor(publisher)
    changed = [
        HOSTS[0],
        Host(HOSTS[1].address, NODE, 50103, HOSTS[1].instance_ip, HOSTS[1].local, "other.1"),
        Host(HOSTS[2].address, NODE, 50103, HOSTS[2].instance_ip, HOSTS[2].local, HOSTS[2].owner, down=True),
        Host(HOSTS[3].address, ip_address("192.0.2.9"), 1, HOSTS[3].instance_ip, True, HOSTS[3].owner),
    ]
    catalogue.replace(changed, ())
    now, was = catalogue._generations, old._generations
    assert [now[it.address] > highest for it in changed] == [False, True, True, False]
    assert now[HOSTS[0].address] == was[HOSTS[0].address]
    assert now[HOSTS[3].address] == was[HOSTS[3].address], "its node has another address, that is all"


def test_a_backend_that_left_meanwhile_changes_the_service(before: tuple[publish.Publisher, Catalogue]) -> None:
    publisher, old = before
    offers = dict(old._offers)
    _, catalogue = successor(publisher)
    fewer = Service(SERVICES[1].address, "maglev", SERVICES[1].backends[1:])
    more = Service(SERVICES[2].address, "closest", (*SERVICES[2].backends, HOSTS[5].address), near=1)
    catalogue.replace(HOSTS, [fewer, more])
    assert catalogue._offers[fewer.address] != offers[fewer.address]
    assert catalogue._offers[more.address] == offers[more.address]


def test_what_nobody_confirms_goes_and_its_places_with_it(before: tuple[publish.Publisher, Catalogue]) -> None:
    publisher, _ = before
    taken, catalogue = successor(publisher)
    catalogue.replace(HOSTS[:2], SERVICES[1:2])
    assert catalogue.disinherit() == len(HOSTS) - 2 + 1
    catalogue.replace_nodes([])
    catalogue.replace([], [])
    taken.publish()
    assert taken._choices.used == 0
    assert taken._hosts.room == SMALL.hosts
    assert taken._services.room == SMALL.services
    assert taken._nodes.room == SMALL.nodes
    assert len(taken._maglev) == SMALL.maglev


def test_a_reader_that_is_in_the_middle_of_a_batch_is_waited_for(before: tuple[publish.Publisher, Catalogue]) -> None:
    publisher, _ = before
    reader = [publisher.epoch]
    taken = publish.Publisher(SMALL, lambda: reader, os.dup(publisher.memory))
    assert not taken.is_quiet()
    reader[0] = taken.epoch
    assert taken.is_quiet()


@pytest.mark.parametrize("damage", ["version", "capacity", "cycle", "link", "twice"])
def test_what_is_not_ours_or_damaged_is_refused(before: tuple[publish.Publisher, Catalogue], damage: str) -> None:
    publisher, _ = before
    tables, capacity = publisher._tables, SMALL
    linked = np.flatnonzero(tables.host_buckets)
    if damage == "version":
        tables.header[layout.H_VERSION] += 1
    elif damage == "capacity":
        capacity = layout.Capacity(hosts=63, services=32, choices=128, maglev=8)
    elif damage == "cycle":
        place = int(tables.host_buckets[linked[0]])
        tables.hosts[place - 1]["next"] = place
    elif damage == "link":
        tables.host_buckets[linked[0]] = 65
    else:
        tables.host_buckets[linked[0]] = tables.host_buckets[linked[1]]
    with pytest.raises(ValueError, match="expected"):
        publish.Publisher(capacity, inherited=os.dup(publisher.memory))


def test_a_writer_killed_at_any_time_leaves_tables_that_work() -> None:
    """Fails if a link was ever stored before what it leads to."""
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    publisher = publish.Publisher(SMALL)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            writer = Catalogue(publish.Publisher(SMALL, inherited=publisher.memory))
            while True:
                size = chance.randrange(3, len(HOSTS))
                writer.replace(HOSTS[:size], [Service(it.address, it.policy, it.backends[:size]) for it in SERVICES])
        time.sleep(chance.uniform(0.01, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        taken, catalogue = successor(publisher)
        catalogue.replace(HOSTS, SERVICES)
        catalogue.disinherit()
        assert catalogue._publisher._hosts.room == SMALL.hosts - len(HOSTS), seed
        catalogue.replace([], [])
        taken.publish()
        assert taken._choices.used == 0, seed


def test_a_block_is_reserved_out_of_a_larger_one() -> None:
    one, other = Buddy(100), Buddy(100)
    starts = [(one.allocate(count), count) for count in (1, 5, 16, 3, 40)]
    for start, count in reversed(starts):
        other.reserve(start, count)
    assert (other.used, other._free) == (one.used, one._free)
    with pytest.raises(ValueError, match="expected a free one"):
        other.reserve(*starts[1])
