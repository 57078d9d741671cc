"""Constant-time, wait-free look-ups in the shared tables (compiled; see ``appliance.tables`` for the theory)."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from appliance.dataplane.native import load_acquire, view
from appliance.tables import layout, segment
from appliance.tables.layout import (
    H_EPOCH,
    H_HOST_MASK,
    H_NODE_MASK,
    H_OVERLAYS,
    H_RANGES,
    H_SEED,
    H_SERVICE_MASK,
)


class Tables(NamedTuple):
    """The arrays of one mapping, in the order of ``layout.sections``."""

    header: Any
    ranges: Any
    overlays: Any
    host_buckets: Any
    hosts: Any
    service_buckets: Any
    services: Any
    choices: Any
    maglev: Any
    node_buckets: Any
    nodes: Any


def attach(fd: int, capacity: layout.Capacity) -> Tables:
    """Map the tables for reading. Raises ValueError if they have another layout or capacity."""
    tables = Tables(**segment.arrays(fd, layout.sections(capacity), writable=False))
    found = (int(tables.header[layout.H_MAGIC]), int(tables.header[layout.H_VERSION]))
    if found != (layout.MAGIC, layout.VERSION):
        raise ValueError(f"tables: expected layout version {layout.VERSION}, got {found[1]}")
    return tables


@njit
def mix(hi, lo, seed):
    """Hash of an address (a multiply-xorshift chain), keyed so that nobody outside can choose colliding addresses."""
    h = (np.uint64(hi) ^ np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(32)) ^ np.uint64(lo)) * np.uint64(0xD6E8FEB86659FD93)
    h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.int64((h ^ (h >> np.uint64(32))) & np.uint64(0x7FFFFFFFFFFFFFFF))


@njit
def _find(buckets, entries, bucket, hi, lo):
    link = load_acquire(buckets, bucket)
    while link != 0:
        entry = entries[link - 1]
        if entry.address_lo == lo and entry.address_hi == hi:
            return link - 1
        link = np.int64(entry.next)
    return np.int64(-1)


# A worker's record ``w`` carries where each array lies (``locate``); these give the arrays.


@njit
def header(w):
    """The header's words."""
    return view(w.header_at, layout.H_WORDS, np.int64)


@njit
def hosts(w):
    """Host entries."""
    return view(w.hosts_at, w.hosts_count, layout.HOST)


@njit
def services(w):
    """Service entries."""
    return view(w.services_at, w.services_count, layout.SERVICE)


@njit
def choices(w):
    """Choice lists of all services."""
    return view(w.choices_at, w.choices_count, layout.CHOICE)


@njit
def maglev_slots(w):
    """Slots of all maglev tables: places in choice lists."""
    return view(w.maglev_at, w.maglev_count, np.uint16)


@njit
def nodes(w):
    """Node entries."""
    return view(w.nodes_at, w.nodes_count, layout.NODE)


LOCATIONS = [
    ("header_at", "i8"),
    ("ranges_at", "i8"),
    ("overlays_at", "i8"),
    ("host_buckets_at", "i8"),
    ("hosts_at", "i8"),
    ("service_buckets_at", "i8"),
    ("services_at", "i8"),
    ("choices_at", "i8"),
    ("maglev_at", "i8"),
    ("node_buckets_at", "i8"),
    ("nodes_at", "i8"),
    ("hosts_count", "i8"),
    ("services_count", "i8"),
    ("choices_count", "i8"),
    ("maglev_count", "i8"),
    ("nodes_count", "i8"),
]


def locate(w: Any, tables: Tables) -> None:
    """Write into a worker's record where the arrays of a mapping lie. The caller keeps the mapping alive."""
    for name, array in tables._asdict().items():
        w[f"{name}_at"] = array.ctypes.data
    for name in ("hosts", "services", "choices", "maglev", "nodes"):
        w[f"{name}_count"] = len(getattr(tables, name))


@njit
def find_host(w, hi, lo):
    """Index of the host entry of a namespace address, or -1."""
    mask = header(w)[H_HOST_MASK]
    buckets = view(w.host_buckets_at, mask + 1, np.uint32)
    return _find(buckets, hosts(w), mix(hi, lo, header(w)[H_SEED]) & mask, hi, lo)


@njit
def find_service(w, hi, lo):
    """Index of the service entry of a ServiceIP, or -1."""
    mask = header(w)[H_SERVICE_MASK]
    buckets = view(w.service_buckets_at, mask + 1, np.uint32)
    return _find(buckets, services(w), mix(hi, lo, header(w)[H_SEED]) & mask, hi, lo)


@njit
def find_node(w, hi, lo):
    """Index of the node entry of an underlay address, or -1."""
    mask = header(w)[H_NODE_MASK]
    buckets = view(w.node_buckets_at, mask + 1, np.uint32)
    return _find(buckets, nodes(w), mix(hi, lo, header(w)[H_SEED]) & mask, hi, lo)


@njit
def in_service_range(w, hi, lo):
    """Whether an address belongs to one of the ServiceIP ranges."""
    return _in_ranges(w.ranges_at, header(w)[H_RANGES], hi, lo)


@njit
def in_overlay(w, hi, lo):
    """Whether an address belongs to one of the overlay's ranges."""
    return _in_ranges(w.overlays_at, header(w)[H_OVERLAYS], hi, lo)


@njit
def _in_ranges(at, count, hi, lo):
    ranges = view(at, layout.RANGES_MAX, layout.RANGE)
    for i in range(count):
        row = ranges[i]
        if (hi & row.mask_hi) == row.hi and (lo & row.mask_lo) == row.lo:
            return True
    return False


@njit
def epoch(w):
    """Number of publications so far."""
    return load_acquire(header(w), H_EPOCH)
