"""Questions of ``appliance trace``: what would happen to a packet on this node, asked of a ``tracer``."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from appliance.dataplane.source import MODES
from appliance.observe import counters, packets
from appliance.observe.tracer import Job
from appliance.supervisor.errors import StartError
from appliance.tables import segment
from appliance.tables.layout import IPAddress
from appliance.tables.publish import ASLEEP

if TYPE_CHECKING:
    from appliance.supervisor.main import Supervisor

TIMEOUT_S: Final = 20.0
"""For one question: a second, or many on a machine that has other things to do."""
Port = Annotated[int, Field(ge=0, le=65535)]


class TraceRequest(BaseModel):
    """A packet, as a person describes it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    protocol: str = "tcp"
    sport: Port = 40_000
    dport: Port = 80
    size: Annotated[int, Field(ge=0, le=packets.SIZE_MAX)] = 0
    fragmentable: bool = False
    from_node: IPv4Address | IPv6Address | None = None
    """The node that sends it to this one; None: a container of this node sends it."""
    ask: bool = False
    """Ask the cluster for what the tables lack, as the packet would."""


async def trace(supervisor: Supervisor, wanted: TraceRequest) -> dict[str, Any]:
    """What would happen. Raises StartError with a sentence if that cannot be said."""
    try:
        packet = packets.build(
            wanted.source, wanted.destination, wanted.protocol, wanted.sport, wanted.dport, wanted.size,
            fits=not wanted.fragmentable,
        )  # fmt: skip
    except ValueError as error:
        raise StartError(str(error)) from error
    if wanted.ask:
        await supervisor.membership.resolve(wanted.destination)
    with ExitStack() as stack:
        guest = segment.create("edge-trace", counters.SECTIONS)
        stack.callback(os.close, guest)
        words = segment.arrays(guest, counters.SECTIONS, writable=True)["counters"]
        words[counters.ANNOUNCED] = ASLEEP
        stack.enter_context(supervisor.pool.guest(words))
        job = _job(supervisor, wanted, packet, guest, stack)
        return await _ask(job)


def _job(supervisor: Supervisor, wanted: TraceRequest, packet: bytes, guest: int, stack: ExitStack) -> Job:
    config, pool = supervisor.config, supervisor.pool

    def readonly(fd: int) -> int:
        copy = segment.readonly(fd)
        stack.callback(os.close, copy)
        return copy

    tables = supervisor.publisher.descriptor()
    stack.callback(os.close, tables)
    addresses = _concerned(supervisor, (wanted.source, wanted.destination))
    hosts, services = supervisor.catalogue.hosts, supervisor.catalogue.services
    sender = None if wanted.from_node is None else (wanted.from_node, config.tunnel.port)
    return Job(
        packet=packet,
        sender=sender,
        refused=wanted.ask,
        tables=tables,
        records=tuple(readonly(worker.fds["records"]) for worker in pool.workers),
        sticky=readonly(pool.sticky),
        counters=guest,
        capacity=supervisor.publisher.capacity,
        flows=config.workers.flows,
        hosts={it: hosts[it] for it in addresses if it in hosts},
        services={it: services[it] for it in addresses if it in services},
        ranges=config.network.services,
        port=config.tunnel.port,
        seed=pool.seed,
        learn=MODES[config.tunnel.learn_hosts],
    )


def _concerned(supervisor: Supervisor, addresses: Iterable[IPAddress]) -> set[IPAddress]:
    """Addresses, and those behind them."""
    found = set(addresses)
    for address in addresses:
        service = supervisor.catalogue.services.get(address)
        found |= set() if service is None else set(service.backends)
    return found


async def _ask(job: Job) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "appliance.observe.tracer",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=job.descriptors(),
    )
    try:
        answer, errors = await asyncio.wait_for(process.communicate(pickle.dumps(job)), TIMEOUT_S)
    except TimeoutError:
        raise StartError(f"trace: expected an answer within {TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise StartError(f"trace: {errors.decode(errors='replace').strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(answer)
    return found
