"""All that a worker holds: one record, made once, never grown, passed to every stage.

What must survive the worker or be seen by others (flow records, counters, tables)
lies in shared memory; the rest is scratch, sized by ``limits``. Message headers are the C structures themselves,
laid out as 64-bit words (struct msghdr and struct mmsghdr of x86-64 and arm64 are the same).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from appliance import limits
from appliance.dataplane import flow, learn, libc, memory, misses
from appliance.dataplane.balance import sticky as sticky_table
from appliance.dataplane.classify import PACKET
from appliance.observe.counters import FROM_TUN, WORDS
from appliance.tables import layout, read

STATE = np.dtype(
    [
        ("index", "i8"),  # which worker
        ("workers", "i8"),  # of how many
        ("tun", "i8"),  # descriptors
        ("wire", "i8"),
        ("handoff", "i8"),
        ("epoll", "i8"),
        ("timer", "i8"),
        ("todo", "i8"),  # stage that is asked for by itself (``staged``); 0: all, again and again
        ("ready", "i8"),  # what that stage begins with, and leaves
        ("again", "i8"),
        ("port", "i8"),  # own tunnel port
        ("source_ports", "i8"),  # sending sockets in use; 0: send from the tunnel port
        ("udp_gso", "i8"),  # may trains be sent; cleared when the kernel says EIO
        ("coalesce", "i8"),  # may super-packets be written into the TUN
        ("epoch", "i8"),  # of the tables, as of this batch
        ("now", "i8"),  # monotonic nanoseconds, as of this batch
        ("next_sweep", "i8"),
        ("random", "i8"),  # numbers drawn so far (``balance.least_flows``)
        ("tun_hot", "i8"),  # drain it, rather than one packet a wake-up
        ("wire_hot", "i8"),
        ("tun_woken", "i8"),  # when it last had something
        ("wire_woken", "i8"),
        ("busy_ns", "i8"),  # how long to look for packets before sleeping; 0: not at all
        ("gap", "i8"),  # how long it recently took until the next packet came, on average
        ("polled", "i8"),  # when the descriptors were last asked what is ready
        ("learn", "i8"),  # ``source.MODES``
        ("fragmenting", "i8"),  # socket for what may be fragmented on the underlay
        ("missed", "i8"),  # eventfd that tells the supervisor of misses
        ("waiting", "i8"),  # addresses that are waited for, or were refused a moment ago
        ("collecting", "i8"),  # datagrams whose fragments are being collected
        ("refusals", "i8"),  # of the supervisor, as far as they were read
        ("settled", "i8"),  # epoch at which those waiting were last looked for
        ("next_settle", "i8"),
        ("next_report", "i8"),
        ("outer_hi", "i8"),  # who sent the datagram at hand
        ("outer_lo", "i8"),
        ("outer_port", "i8"),
        ("turn", "i8"),  # of the worker's loop
        ("sampled", "i8"),  # is this turn's time taken (``stages``)
        ("stage", "i8"),  # which stage is at work, in a turn that is sampled
        ("stage_since", "i8"),
        ("sampled_packets", "i8"),  # packets counted when the sampled turn began
        ("capturing", "i8"),  # packets are copied for the supervisor (``capture``)
        ("captured", "i8"),  # records that were ever written
    ]
)

RUN = np.dtype(
    [
        ("fd", "i8"),
        ("node_hi", "i8"),
        ("node_lo", "i8"),
        ("port", "i8"),
        ("segments", "i8"),
        ("size", "i8"),  # bytes of every segment but a shorter last
        ("total", "i8"),
        ("closed", "i8"),  # the last one was shorter: nothing may follow
    ]
)

MERGE = np.dtype(
    [
        ("segments", "i8"),
        ("version", "i8"),
        ("protocol", "i8"),
        ("l4", "i8"),  # offset of the transport header from the IP header
        ("header", "i8"),
        ("size", "i8"),  # payload of every segment but a shorter last
        ("payload", "i8"),
        ("next_sequence", "i8"),
        ("next_id", "i8"),
        ("id_step", "i8"),  # 0: constant, 1: counting, -1: not known yet
        ("closed", "i8"),
        ("flow", "i8"),
        ("node_hi", "i8"),  # who sent the first segment
        ("node_lo", "i8"),
    ]
)

# The fragments of one datagram (``fragment``).
COLLECTION = np.dtype(
    [
        ("source_hi", "i8"),
        ("source_lo", "i8"),
        ("destination_hi", "i8"),
        ("destination_lo", "i8"),
        ("identification", "i8"),
        ("protocol", "i8"),  # and the version and the stage, so that these never mix
        ("deadline", "i8"),
        ("end", "i8"),  # length of the datagram's data, 0 until the last fragment tells
        ("received", "i8"),  # bytes of it
        ("part", "i8"),  # bytes of the header that each fragment repeats; 0 until the first fragment tells
        ("next_at", "i8"),  # IPv6: where in it the next header is named
        ("piece", "i8"),  # size of the largest fragment
        ("state", "i4"),
        ("count", "i4"),
        ("at", "u2", (limits.FRAGMENTS_EACH,)),  # where the data of each fragment lies
        ("length", "u2", (limits.FRAGMENTS_EACH,)),
    ]
)
FREE, COLLECTING, SPOILED = range(3)
HEADROOM = 256  # bytes before the data, in which the header is put
PART_MAX = limits.HEADER_MAX - 8  # of a header that each piece repeats, with an IPv6 fragment header behind it
ROOM = HEADROOM + limits.PACKET_MAX + 1

VECTORS = 2 * (limits.UDP_SEGMENTS_MAX + 1)  # each segment of a run is a header (or whole packet) and a payload
MSGHDR_WORDS = 8  # struct mmsghdr; a msghdr is its first 7
NAME, NAME_LENGTH, IOV, IOV_LENGTH, CONTROL, CONTROL_LENGTH, FLAGS, RECEIVED = range(8)
NAME_SIZE = 32  # struct sockaddr_in6 is 28
CONTROL_WORDS = 8
SLOT = 65_536  # bytes of a receive slot


EVENTS = 5  # descriptors that a worker waits for: TUN, wire, hand-over, wake, timer
# struct epoll_event is packed on x86-64 only (<sys/epoll.h>).
EVENT_SIZE, EVENT_DATA = (12, 4) if platform.machine() == "x86_64" else (16, 8)

# A worker is one record, so that a stage is handed one pointer. Nested arrays have fixed sizes (``limits``); what
# depends on a capacity, or is shared, lies elsewhere and is found through ``…_at``.
WORKER = np.dtype(
    [
        *read.LOCATIONS,
        *flow.LOCATIONS,
        *memory.LOCATIONS,
        ("state", STATE, (1,)),
        ("packet", PACKET, (1,)),
        ("libc", "i8", (16,)),
        ("source_fds", "i8", (limits.SOURCE_PORTS_MAX,)),
        ("handoff_ports", "i8", (limits.WORKERS_MAX,)),
        ("events", "u1", (EVENTS * EVENT_SIZE,)),
        ("scratch", "i8", (8,)),
        # outbound
        ("run", RUN, (limits.RUNS,)),
        ("run_open", "i8"),  # a bit for each that holds packets
        ("run_place", "i8"),  # which was prepared last
        ("read_base", "i8"),  # where in the read buffer the next packet goes
        ("run_iov", "i8", (limits.RUNS * 2 * VECTORS,)),
        ("run_message", "i8", (MSGHDR_WORDS,)),
        ("run_control", "i8", (CONTROL_WORDS,)),
        ("run_name", "u1", (NAME_SIZE,)),
        ("run_headers", "u1", (limits.RUNS * (limits.UDP_SEGMENTS_MAX + 1) * limits.HEADER_MAX,)),
        # inbound
        ("merge", MERGE, (1,)),
        ("merge_iov", "i8", (2 * (limits.COALESCE_SEGMENTS + 2),)),
        ("merge_header", "u1", (256,)),
        ("merge_origin", "u1", (limits.HEADER_MAX,)),
        ("slot_iov", "i8", (2 * limits.WIRE_BATCH,)),
        ("slot_messages", "i8", (MSGHDR_WORDS * limits.WIRE_BATCH,)),
        ("slot_control", "i8", (CONTROL_WORDS * limits.WIRE_BATCH,)),
        ("slot_names", "u1", (NAME_SIZE * limits.WIRE_BATCH,)),
        # hand-over between workers
        ("hand_iov", "i8", (4,)),
        ("hand_message", "i8", (MSGHDR_WORDS,)),
        ("hand_name", "u1", (NAME_SIZE,)),
        ("meta", "i8", (misses.META_WORDS,)),
        ("foreseen", "i8", (limits.WIRE_BATCH,)),  # hashes of the flows of what the slots hold
        # what waits, what was learned, what is being put together
        ("waiting", misses.WAITING, (limits.HELD_ADDRESSES,)),
        ("held_free", "i8"),
        ("held_stack", "i4", (limits.HELD_SLOTS,)),
        ("held_next", "i4", (limits.HELD_SLOTS,)),
        ("held_more", "i4", (limits.HELD_SLOTS,)),
        ("held_length", "i4", (limits.HELD_SLOTS,)),
        ("learned", learn.LEARNED, (limits.LEARNED_HOSTS,)),
        ("collections", COLLECTION, (limits.FRAGMENTED,)),
        ("pieces", "i8", (4,)),
        ("buckets", "i8", (limits.REPLY_SOURCES,)),
        ("reply", "u1", (2_048,)),
        ("drops_before", "i8", (WORDS - FROM_TUN,)),  # ``capture``: to see why a packet was dropped
        # packets
        ("held", "u1", (limits.HELD_SLOT * limits.HELD_SLOTS,)),
        ("collected", "u1", (ROOM * limits.FRAGMENTED,)),
        ("assembled", "u1", (limits.PACKET_MAX + 1,)),
        ("buffer", "u1", (limits.READ_BUFFER,)),
        ("slots", "u1", (SLOT * limits.WIRE_BATCH,)),
    ]
)


class Worker(NamedTuple):
    """A worker's record (an array of one) and the arrays to which it points, which must live as long."""

    record: Any
    tables: read.Tables
    flows: flow.FlowTable
    counters: Any
    control: Any
    misses: Any
    positions: Any
    loads: Any
    sticky: Any


@dataclass(frozen=True)
class Descriptors:
    """What a worker reads and writes."""

    tun: int
    wire: int
    handoff: int
    epoll: int  # what the worker sleeps on (``sleep.descriptor``)
    sources: tuple[int, ...] = ()
    fragmenting: int = -1
    missed: int = -1
    timer: int = -1  # wakes an idle worker (``sleep.timer``)


@dataclass(frozen=True)
class Settings:
    """What a worker is told once, at its start."""

    index: int = 0
    workers: int = 1
    port: int = 50103
    udp_gso: bool = True
    coalesce: bool = True
    handoff_ports: tuple[int, ...] = ()
    seed: int = 0
    learn: int = 0
    busy_ns: int = 0
    system_calls: Any = field(default_factory=libc.table)


def make(
    settings: Settings,
    descriptors: Descriptors,
    tables: read.Tables,
    records: Any,
    counters: Any,
    control: Any,
    reports: Any,
    sticky: Any = None,
) -> Worker:
    """A worker over its shared memory, with fresh scratch memory. Without ``sticky`` it remembers clients by itself."""
    record = np.zeros(1, WORKER)
    w = record[0]
    read.locate(w, tables)
    flows = flow.make(w, records, settings.seed)
    positions = np.full(int(tables.header[layout.H_SERVICES]), settings.index, dtype=np.uint32)
    # One more than there are hosts: what goes to a learned host counts for nobody.
    loads = np.zeros(int(tables.header[layout.H_HOSTS]) + 1, dtype=np.uint32)
    if sticky is None:
        sticky = np.zeros(sticky_table.SECTIONS[0][2], dtype=np.int64)
    w["counters_at"], w["control_at"] = counters.ctypes.data, control.ctypes.data
    w["misses_at"] = reports.ctypes.data
    w["held_stack"], w["held_free"] = np.arange(limits.HELD_SLOTS)[::-1], limits.HELD_SLOTS
    w["state"][0]["refusals"] = control[misses.REFUSALS]
    for name, array in (("positions", positions), ("loads", loads), ("sticky", sticky)):
        w[f"{name}_at"], w[f"{name}_count"] = array.ctypes.data, len(array)
    _set_state(w["state"][0], settings, descriptors)
    _set_arrays(w, settings, descriptors)
    _set_slots(record)
    return Worker(record, tables, flows, counters, control, reports, positions, loads, sticky)


def _set_state(state: Any, settings: Settings, descriptors: Descriptors) -> None:
    state["index"], state["workers"] = settings.index, settings.workers
    state["tun"], state["wire"], state["handoff"] = descriptors.tun, descriptors.wire, descriptors.handoff
    state["epoll"], state["timer"] = descriptors.epoll, descriptors.timer
    state["port"], state["source_ports"] = settings.port, len(descriptors.sources)
    state["udp_gso"], state["coalesce"] = settings.udp_gso, settings.coalesce
    state["learn"], state["busy_ns"] = settings.learn, settings.busy_ns
    state["fragmenting"], state["missed"] = descriptors.fragmenting, descriptors.missed


def _set_arrays(w: Any, settings: Settings, descriptors: Descriptors) -> None:
    w["libc"][: len(settings.system_calls)] = settings.system_calls
    w["source_fds"][: len(descriptors.sources)] = descriptors.sources
    w["handoff_ports"][: len(settings.handoff_ports)] = settings.handoff_ports


def _set_slots(record: Any) -> None:
    """Point the receive messages at their slots. Slots are 64 KiB: shorter ones would cut trains silently."""
    base, fields = record.ctypes.data, WORKER.fields
    assert fields is not None
    at = {name: base + fields[name][1] for name in ("slots", "slot_iov", "slot_control", "slot_names")}
    w = record[0]
    for i in range(limits.WIRE_BATCH):
        w["slot_iov"][2 * i : 2 * i + 2] = at["slots"] + i * SLOT, SLOT
        message = w["slot_messages"][MSGHDR_WORDS * i : MSGHDR_WORDS * (i + 1)]
        message[NAME] = at["slot_names"] + NAME_SIZE * i
        message[IOV], message[IOV_LENGTH] = at["slot_iov"] + 16 * i, 1
        message[CONTROL] = at["slot_control"] + 8 * CONTROL_WORDS * i
