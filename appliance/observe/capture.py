"""Captured packets: read from a worker's ring, chosen by a filter, written as pcapng with a comment each.

Pure but for the ring, of which the reader owns the TAIL (``dataplane.capture``). A capture has four interfaces, one
for each place where packets pass, so both sides of a translation lie side by side.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

from pcapng import FileWriter
from pcapng.blocks import EnhancedPacket, InterfaceDescription, SectionHeader

from appliance import __version__, limits
from appliance.dataplane import capture, misses
from appliance.observe import packets
from appliance.observe.counters import FROM_TUN, FROM_WIRE, Drop
from appliance.observe.meanings import sentence
from appliance.observe.packets import IPAddress, Meaning
from appliance.tables import layout

INTERFACES: Final = {
    capture.FROM_CONTAINER: ("from-container", "before translation, from containers of this node"),
    capture.TO_NODE: ("to-node", "after translation, to other nodes, without the tunnel's headers"),
    capture.FROM_NODE: ("from-node", "before translation, from other nodes, without the tunnel's headers"),
    capture.TO_CONTAINER: ("to-container", "after translation, to containers of this node"),
}
_RAW_IP: Final = 101  # LINKTYPE_RAW
_NANOSECONDS: Final = 9
_MASK: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class Captured:
    """One record of a worker's ring."""

    worker: int
    time: int  # CLOCK_MONOTONIC nanoseconds
    kind: int
    length: int
    data: bytes
    node: IPAddress
    port: int
    reason: str  # of the drop; empty if it was not dropped while it was looked at

    def comment(self) -> str:
        """What a person wants to know beside the bytes."""
        parts = [f"worker {self.worker}"]
        if self.kind in (capture.TO_NODE, capture.FROM_NODE):
            way = "to" if self.kind == capture.TO_NODE else "from"
            at = f"[{self.node}]:{self.port}" if self.node.version == 6 else f"{self.node}:{self.port}"
            parts.append(f"{way} node {at}")
        if self.reason:
            parts.append(f"dropped, {self.reason}: {sentence(self.reason)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Filter:
    """Which packets are wanted. Each of ``ends`` is all addresses of one end of a flow; none: any end."""

    ends: tuple[frozenset[IPAddress], ...] = ()
    ports: frozenset[int] = frozenset()
    protocols: frozenset[int] = frozenset()
    drops: bool = False

    def wants(self, packet: Captured) -> bool:
        """Whether a packet is one of them. One that cannot be read is wanted only if everything is."""
        if self.drops and not packet.reason:
            return False
        if not (self.ends or self.ports or self.protocols):
            return True
        meaning = packets.read(packet.data)
        return meaning is not None and self._fits(meaning)

    def _fits(self, meaning: Meaning) -> bool:
        if self.protocols and meaning.protocol not in self.protocols:
            return False
        if not self.ports <= {meaning.source_port, meaning.destination_port}:
            return False
        one = meaning.source, meaning.destination
        return any(all(at in end for at, end in zip(way, self.ends, strict=False)) for way in (one, one[::-1]))


class Ring:
    """The reader's side of a worker's ring. ``words``: of the segment of what it tells (``misses.SECTIONS``)."""

    def __init__(self, worker: int, words: Any) -> None:
        self._worker = worker
        self._ring = words[misses.CAPTURE_AT :]

    def skip(self) -> None:
        """Forget what was noted before."""
        self._ring[capture.TAIL] = self._ring[capture.HEAD]

    @property
    def lost(self) -> int:
        """Packets for which there was no room, ever."""
        return int(self._ring[capture.LOST])

    def take(self) -> Iterator[Captured]:
        """What was noted since the last time."""
        tail, head = int(self._ring[capture.TAIL]), int(self._ring[capture.HEAD])
        for number in range(max(tail, head - limits.CAPTURE_SLOTS), head):
            at = capture.RECORDS + capture.SLOT_WORDS * (number & (limits.CAPTURE_SLOTS - 1))
            yield self._read(self._ring[at : at + capture.SLOT_WORDS])
        self._ring[capture.TAIL] = head

    def _read(self, record: Any) -> Captured:
        kept = max(0, min(int(record[capture.KEPT]), capture.ROOM))
        return Captured(
            self._worker,
            int(record[capture.TIME]),
            int(record[capture.KIND]),
            int(record[capture.LENGTH]),
            record[capture.HEADER :].tobytes()[:kept],
            layout.address(int(record[capture.NODE_HI]), int(record[capture.NODE_LO])),
            int(record[capture.PORT]),
            _reason(int(record[capture.REASON])),
        )


def _reason(word: int) -> str:
    """The label of a drop counter's word."""
    if not word:
        return ""
    number = word - (FROM_WIRE if word >= FROM_WIRE else FROM_TUN)
    return Drop(number).label if number in Drop._value2member_map_ else f"reason {number}"


class Pcapng:
    """A pcapng section (draft-ietf-opsawg-pcapng), as pieces of bytes: ``head``, then ``packets`` as they come."""

    def __init__(self, node: str) -> None:
        self._out = BytesIO()
        options = {"shb_userappl": f"edge-appliance {__version__}", "opt_comment": f"node {node}"}
        self._section = SectionHeader(options=options)
        self._interfaces = {kind: self._interface(*texts) for kind, texts in INTERFACES.items()}
        self._writer = FileWriter(self._out, self._section)
        self._epoch = time.time_ns() - time.monotonic_ns()

    def _interface(self, name: str, description: str) -> Any:
        options = {"if_name": name, "if_description": description, "if_tsresol": bytes([_NANOSECONDS])}
        return self._section.new_member(InterfaceDescription, link_type=_RAW_IP, snaplen=capture.ROOM, options=options)

    def packets(self, captured: Iterable[Captured]) -> bytes:
        """The blocks of some packets, in the order of their time, behind whatever was not taken yet."""
        for packet in sorted(captured, key=lambda it: it.time):
            self._add(packet)
        data = self._out.getvalue()
        self._out.seek(0)
        self._out.truncate()
        return data

    def _add(self, packet: Captured) -> None:
        interface = self._interfaces.get(packet.kind)
        if interface is None:  # a worker that writes nonsense
            return
        at = packet.time + self._epoch
        block = self._section.new_member(
            EnhancedPacket,
            interface_id=interface.interface_id,
            timestamp_high=at >> 32 & _MASK,
            timestamp_low=at & _MASK,
            packet_len=packet.length,
            packet_data=packet.data,
            options={"opt_comment": packet.comment(), "epb_queue": packet.worker},
        )
        self._writer.write_block(block)
