"""Compiling the packet path ahead of time, into numba's cache."""

from __future__ import annotations

import os
import time

from appliance.config import Config
from appliance.dataplane import cache


def warm(config: Config) -> float:
    """Compile what the supervisor and the workers run, into ``paths.cache``; gives the seconds that it took."""
    started = time.monotonic()
    cache.use(config.paths.cache)
    compile_kernels()
    compile_publisher()
    cache.prune(config.paths.cache)
    return time.monotonic() - started


def compile_kernels() -> None:
    """Load the workers' loop, compiling it if the cache lacks it: run it with the stop word set."""
    import numpy as np

    from appliance.dataplane import flow, memory, misses, staged, state
    from appliance.observe import counters
    from appliance.tables import layout, publish, read

    capacity = layout.Capacity(16, 16, 16, 16)
    publisher = publish.Publisher(capacity)
    fd = publisher.descriptor()
    control = np.zeros(memory.CONTROL_COUNT, np.int64)
    control[memory.STOP] = 1
    made = state.make(
        state.Settings(),
        state.Descriptors(-1, -1, -1, -1),
        read.attach(fd, capacity),
        np.zeros(16, flow.FLOW),
        np.zeros(counters.WORDS, np.int64),
        control,
        np.zeros(misses.RING_WORDS, np.int64),
    )
    staged.forward(made.record, control)
    publisher.close()
    os.close(fd)


def compile_publisher() -> None:
    """Load the writer's side of the tables, compiling what the cache lacks: each kind of change, once.

    Whoever has not done so holds up its event loop at the first change of each kind: 0.2 s at the first removal of an
    instance, more than a second at the first `maglev` service.
    """
    from ipaddress import ip_address

    from appliance.tables import layout
    from appliance.tables.catalogue import Catalogue, Host, Node, Service
    from appliance.tables.publish import Publisher

    publisher = Publisher(layout.Capacity(16, 16, 16, 16))
    address = ip_address("10.18.0.2")
    catalogue = Catalogue(publisher)
    catalogue.replace([Host(address, address, 1)], [Service(address, "rr", (address,))])
    catalogue.replace_nodes([Node(address, 1)])
    catalogue.replace([Host(address, address, 1)], [Service(address, "maglev", (address,))])
    catalogue.replace([], [])
    catalogue.replace_nodes([])
    publisher.close()
