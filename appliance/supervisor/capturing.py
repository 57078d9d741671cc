"""``appliance capture``: the rings of all workers, read while somebody listens.

Theory of operation
-------------------
*Owns* the capture word of every worker and the readers' side of the rings, for one capture at a time: a ring has one
reader. *Runs* in the supervisor's event loop, every ``PAUSE_S``; a pass takes at most ``limits.CAPTURE_SLOTS`` packets
of each worker. Whoever reads too slowly loses packets, and workers never wait.

When the listener goes, or has got what it wanted, the word is cleared, and the rings' memory is given back once the
workers, which look at the word once a batch, have had the time to see it.
"""

from __future__ import annotations

import asyncio
import mmap
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from appliance.dataplane import memory, misses
from appliance.observe import packets
from appliance.observe.capture import Captured, Filter, Pcapng, Ring
from appliance.supervisor.errors import StartError
from appliance.tables.layout import IPAddress

if TYPE_CHECKING:
    from appliance.supervisor.main import Supervisor

PAUSE_S: Final = 0.02
SETTLE_S: Final = 0.2
"""Twice the longest sleep of a worker (``limits.WAIT_NS``): then all have seen that nobody captures any more."""
Host = IPv4Address | IPv6Address


class CaptureRequest(BaseModel):
    """Which packets, and how many or for how long; all that is not given is not limited."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hosts: Annotated[tuple[Host, ...], Field(max_length=2)] = ()
    """Ends of the flow: a namespace address, an instance IP or a ServiceIP means all of them that belong together."""
    ports: Annotated[tuple[Annotated[int, Field(ge=0, le=65535)], ...], Field(max_length=2)] = ()
    protocol: str = ""
    drops: bool = False
    count: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None


class Capturing:
    """See the module."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._busy = False
        self._stopping = False

    async def stop(self, _application: object = None) -> None:
        """End the capture that runs: whoever listens would hold up the end of the API."""
        self._stopping = True

    def chosen(self, wanted: CaptureRequest) -> Filter:
        """The filter of a request. Raises StartError if another capture runs, or there is no such protocol."""
        if self._busy:
            raise StartError("capture: expected one at a time, and another one runs")
        protocols = {packets.ICMP6} if wanted.protocol == "icmp" else set()
        if wanted.protocol in packets.PROTOCOLS:
            protocols.add(packets.PROTOCOLS[wanted.protocol])
        elif wanted.protocol:
            raise StartError(f"protocol: expected one of {', '.join(packets.PROTOCOLS)}, got {wanted.protocol!r}")
        ends = tuple(frozenset(self._aliases(host)) for host in wanted.hosts)
        return Filter(ends, frozenset(wanted.ports), frozenset(protocols), wanted.drops)

    async def run(self, wanted: CaptureRequest, chosen: Filter) -> AsyncGenerator[bytes, None]:
        """Pieces of a pcapng section, some empty, the last one when the request is fulfilled. To be closed by its user,
        who looks after each piece whether anybody still listens."""
        self._busy = True
        pool = self._supervisor.pool
        rings = [Ring(worker.index, worker.messages) for worker in pool.workers]
        try:
            for ring in rings:
                ring.skip()
            self._switch(1)
            async with aclosing(self._pieces(rings, wanted, chosen)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._switch(0)
            asyncio.get_running_loop().call_later(SETTLE_S, self._settled)

    async def _pieces(self, rings: list[Ring], wanted: CaptureRequest, chosen: Filter) -> AsyncGenerator[bytes, None]:
        file = Pcapng(self._supervisor.config.node.id or str(self._supervisor.address))
        end = None if wanted.seconds is None else time.monotonic() + wanted.seconds
        left = wanted.count
        yield file.packets(())
        while not self._stopping and (end is None or time.monotonic() < end) and (left is None or left > 0):
            self._supervisor.pool.wake()  # an idle worker publishes what it noted when its next batch begins
            await asyncio.sleep(PAUSE_S)
            found: list[Captured] = [it for ring in rings for it in ring.take() if chosen.wants(it)][:left]
            left = None if left is None else left - len(found)
            yield file.packets(found)

    def _aliases(self, address: IPAddress) -> set[IPAddress]:
        """All addresses under which the packets of one end may be seen: before and after translation."""
        catalogue = self._supervisor.catalogue
        service = catalogue.services.get(address)
        found = {address} | (set() if service is None else set(service.backends))
        hosts = [catalogue.hosts[it] for it in found if it in catalogue.hosts]
        return found | {host.instance_ip for host in hosts if host.instance_ip is not None}

    def _switch(self, value: int) -> None:
        for worker in self._supervisor.pool.workers:
            worker.control[memory.CAPTURE] = value

    def _settled(self) -> None:
        """Give the rings' memory back; they are zeros then, as they were at first."""
        self._busy = False
        start, _ = divmod(8 * misses.CAPTURE_AT, mmap.PAGESIZE)
        for worker in self._supervisor.pool.workers:
            with mmap.mmap(worker.fds["misses"], 0) as memory_:
                memory_.madvise(mmap.MADV_REMOVE, start * mmap.PAGESIZE, len(memory_) - start * mmap.PAGESIZE)
