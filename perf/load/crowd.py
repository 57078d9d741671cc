"""UDP packets of any number of flows in random order, a packet each: prepared beforehand, sent as fast as they go.

A socket a flow would make a hundred thousand sockets, so the packets come from one. It is a container's, raw, and takes
each packet's UDP header from its data (raw(7)); or a node's, whose payloads are whole packets, as a tunnel's are, and
leave as trains (`UDP_SEGMENT`) of packets that the receiver steers alike, as an appliance's do."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from perf.load.native import IOVEC, MESSAGE, NOWHERE, SECOND, addresses, compiled, monotonic, sendmmsg
from perf.load.udp import SO_RCVBUFFORCE, Sent

PACKETS: Final = 1 << 17
"""Prepared, whatever the number of flows; they are sent in the same order again and again."""
PAYLOAD: Final = 64
UDP, IPV4 = 8, 20
"""Bytes of the headers."""
BATCH: Final = 64
"""Messages a system call."""
SOURCES: Final = 50_000
"""Source ports in use; flows beyond that have the next destination port."""
FIRST_SOURCE, FIRST_DESTINATION, LAST_DESTINATION = 1_024, 7_000, 7_099
TRAIN: Final = 4
"""Packets of a node's send: what the appliance has of 10 to 100,000 flows in random turns."""
CLASSES: Final = 16
"""Of flows that one source port of an appliance carries."""
SEED: Final = 4
WARM_S: Final = 0.7
"""Seconds before what is measured: every packet is sent once, so every flow is known."""
_SO_SNDBUFFORCE, _SNDBUF, _UDP_SEGMENT = SO_RCVBUFFORCE - 1, 4 << 20, 103

Rows = NDArray[np.uint8]


def datagrams(flows: int) -> Rows:
    """UDP headers with payloads, a row each, without checksums: each flow as often as any other, in no order."""
    order = np.random.default_rng(SEED).permutation(PACKETS) % flows
    rows = np.zeros((PACKETS, UDP + PAYLOAD), np.uint8)
    words = rows.view(">u2")
    words[:, 0], words[:, 1] = FIRST_SOURCE + order % SOURCES, FIRST_DESTINATION + order // SOURCES
    words[:, 2] = UDP + PAYLOAD
    return rows


def packets(source: str, destination: str, flows: int) -> Rows:
    """The same as IPv4 packets, in trains: each has flows of one class of the hash that the receiver steers by."""
    inner = datagrams(flows)
    rows = np.zeros((PACKETS, IPV4 + inner.shape[1]), np.uint8)
    header = struct.pack("!BBHHHBBH", 0x45, 0, rows.shape[1], 0, 0x4000, 64, socket.IPPROTO_UDP, 0)
    ends = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(destination).packed
    rows[:, :IPV4] = np.frombuffer(header + ends, np.uint8)
    total = sum(struct.unpack("!10H", header + ends))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = 0xFFFF - ((total & 0xFFFF) + (total >> 16))
    rows[:, 10:12] = np.frombuffer(struct.pack("!H", checksum), np.uint8)
    rows[:, IPV4:] = inner
    return _in_trains(rows, destination)


def _in_trains(rows: Rows, destination: str) -> Rows:
    """Rows in another order: TRAIN neighbours are of one class, and the classes of the trains take random turns."""
    from appliance.dataplane.steering import steer  # compiled here, where it is needed
    from appliance.tables import layout

    ports = rows[:, IPV4 : IPV4 + 4].copy().view(">u2").astype(np.int64)
    local = layout.words(destination)
    known = {(sport, dport): int(steer(*local, sport, dport)) % CLASSES for sport, dport in np.unique(ports, axis=0)}
    kinds = np.array([known[sport, dport] for sport, dport in ports.tolist()])
    together = [np.flatnonzero(kinds == kind) for kind in range(CLASSES)]
    trains = np.concatenate([it[: len(it) // TRAIN * TRAIN].reshape(-1, TRAIN) for it in together])
    return np.ascontiguousarray(rows[np.random.default_rng(SEED).permutation(trains).reshape(-1)])


@compiled
def _send(handle: int, messages: NDArray[Any], duration: int) -> tuple[int, int, int]:
    """Sends the messages in order for `duration` ns, from the first on again and again: sent, refused, ns."""
    clock = np.zeros(2, np.int64)
    begin = now = monotonic(clock)
    sent = refused = at = 0
    while now - begin < duration:
        count = min(BATCH, len(messages) - at)
        done = max(0, sendmmsg(handle, messages.ctypes.data + at * messages.itemsize, count, 0))
        sent += done
        refused += count - done
        at = (at + count) % len(messages)
        now = monotonic(clock)
    return sent, refused, now - begin


class Crowd:
    """Prepared packets and the socket that they leave from."""

    def __init__(self, endpoint: socket.socket, rows: Rows, train: int) -> None:
        self._endpoint, self._rows, self._train = endpoint, rows, train
        endpoint.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SNDBUF)
        size = train * rows.shape[1]
        self._iovecs = np.zeros(len(rows) // train, IOVEC)
        self._iovecs["base"], self._iovecs["length"] = addresses(rows)[::train][: len(self._iovecs)], size
        self._messages = np.zeros(len(self._iovecs), MESSAGE)
        self._messages["iov"], self._messages["iov_count"] = addresses(self._iovecs), 1
        _send(NOWHERE, self._messages, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._endpoint.close()

    def send(self, seconds: float) -> Sent:
        """Sends for so many seconds, as fast as one core can."""
        sent, refused, duration = _send(self._endpoint.fileno(), self._messages, int(seconds * SECOND))
        return Sent(sent * self._train, refused * self._train, duration / SECOND)


def of_container(address: str, flows: int) -> Crowd:
    """Packets of a container to an IPv4 address. Raises OSError."""
    endpoint = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    endpoint.connect((address, 0))
    return Crowd(endpoint, datagrams(flows), 1)


def of_node(node: str, port: int, source: str, destination: str, flows: int) -> Crowd:
    """Packets between two containers' IPv4 addresses, as one node sends them to another. Raises OSError."""
    rows = packets(source, destination, flows)
    endpoint = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    endpoint.connect((node, port))
    endpoint.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, rows.shape[1])
    return Crowd(endpoint, rows, TRAIN)
