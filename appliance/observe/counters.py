"""Names of everything that a worker counts, and where each lies in its counter segment.

A worker is the only writer of its segment, an int64 array; the supervisor reads it at any time. A count may be read
while it grows, which is harmless: each is one aligned word.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final

import numpy as np


class Drop(IntEnum):
    """Why a packet was dropped; one enumeration for the packet path, the metrics, the tools and the tests."""

    NONE = 0
    MALFORMED = 1
    FRAGMENT = 2  # overlapping, too many, or more than there is room for
    UNSUPPORTED_PROTOCOL = 3
    SPOOFED_SOURCE = 4
    NO_ROUTE = 5
    UNKNOWN_SERVICE = 6
    NO_INSTANCE = 7
    REVERSE_IN_USE = 8
    NOT_LOCAL = 9
    FLOW_TABLE_FULL = 10
    SEND_FAILED = 11
    TUN_WRITE_FAILED = 12
    FRAGMENT_TIMEOUT = 13  # of a datagram that never became whole
    UNKNOWN_PEER = 14  # the underlay's source is no node of the cluster
    PEER_SPOOF = 15  # the sender inside is not at the node that sent it
    NESTED_OVERLAY = 16  # a tunnel packet inside the tunnel
    ICMP_NO_FLOW = 17  # an ICMP error about no live flow
    TOO_BIG = 18  # for the path to the target's node; the sender was told

    @property
    def label(self) -> str:
        """Its name in metrics and tools."""
        return self.name.lower().replace("_", "-")


class Count(IntEnum):
    """Counters of one worker. ``TUN_`` and ``WIRE_`` tell where a packet came from."""

    TUN_READS = 0  # system calls that gave a packet or super-packet
    TUN_PACKETS = 1  # packets, super-packets counted by their segments
    TUN_BYTES = 2
    WIRE_READS = 3  # datagrams or trains received
    WIRE_PACKETS = 4
    WIRE_BYTES = 5
    SENT_CALLS = 6
    SENT_PACKETS = 7
    SENT_BYTES = 8
    WRITTEN_CALLS = 9
    WRITTEN_PACKETS = 10
    WRITTEN_BYTES = 11
    HANDED_OVER = 12  # packets passed to the worker that owns their flow
    FLOWS_OPENED = 13
    FLOWS_EXPIRED = 14
    FLOWS_EVICTED = 15
    FLOWS_MOVED = 16  # re-decided because their backend changed
    FLOWS_LIVE = 17  # a gauge
    WAITS = 18  # sleeps for lack of work
    GSO_REFUSED = 19  # trains that had to be sent one packet at a time
    TUN_ERRORS = 20  # reads that failed for another reason than an empty queue
    WIRE_ERRORS = 21
    MISSES = 22  # addresses that the supervisor was asked about
    MISSES_LOST = 23  # for which the ring to the supervisor had no room
    HELD = 24  # packets kept until an address was known
    LEARNED = 25  # senders whose node was learned from their packets
    REPLIES = 26  # ICMP errors and TCP resets that we sent to containers
    REPLIES_LIMITED = 27  # that we would have sent, had not the same source got so many
    REASSEMBLED = 28  # datagrams put together from their fragments
    TRANSLATED_ERRORS = 29  # ICMP errors with the packet inside translated
    PROBES_ANSWERED = 30  # round-trip probes of other nodes


class Stage(IntEnum):
    """What a worker's time goes into (``dataplane.stages``)."""

    WAIT = 0  # asleep, or looking for what is ready
    UPKEEP = 1  # flows and fragments that expire, packets that waited
    READ = 2  # read(2) from the TUN
    OUTBOUND = 3  # what is decided and rewritten on the way out
    SEND = 4  # sendmsg(2) to the wire
    RECEIVE = 5  # recvmmsg(2) from the wire
    INBOUND = 6  # what is decided, rewritten and merged on the way in
    WRITE = 7  # writev(2) to the TUN


# Words of the segment.
ANNOUNCED: Final = 0  # epoch that this worker announced to the writer of the tables
HEARTBEAT: Final = 1  # CLOCK_MONOTONIC nanoseconds of its last batch
COUNTS: Final = 8
STAGES: Final = 48  # nanoseconds by stage, of the turns that were sampled
SAMPLED: Final = 56  # turns
SAMPLED_PACKETS: Final = 57  # from either side, in those turns
FROM_TUN: Final = 64  # drops by reason, of packets from containers
FROM_WIRE: Final = 96  # drops by reason, of packets from other nodes
WORDS: Final = 128

SECTIONS: Final = [("counters", np.dtype(np.int64), WORDS)]


def snapshot(words: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, int]:
    """Counters by name."""
    return {count.name.lower(): int(words[COUNTS + count]) for count in Count}


def stages(words: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, int]:
    """Nanoseconds by stage, turns and packets, of the turns of a worker's loop that were sampled."""
    times = {stage.name.lower(): int(words[STAGES + stage]) for stage in Stage}
    return {**times, "turns": int(words[SAMPLED]), "packets": int(words[SAMPLED_PACKETS])}


def drops(words: np.ndarray[Any, np.dtype[np.int64]]) -> Mapping[str, dict[str, int]]:
    """Drops that happened, by direction (``tun``, ``wire``) and reason."""
    return {
        direction: {reason.label: int(words[base + reason]) for reason in Drop if words[base + reason]}
        for direction, base in (("tun", FROM_TUN), ("wire", FROM_WIRE))
    }
