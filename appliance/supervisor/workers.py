"""The workers of this node: their memory and descriptors, their start, watch and replacement.

Theory of operation
-------------------
The pool owns, for each worker, what must outlive it: TUN queue, sockets, flow records, counters; and for
all of them the table of sticky clients. The processes are
forked by the template (``supervisor.template``) and watched through pidfds, so a death is noticed at once, whoever
reaps it. A dead worker is replaced on the same descriptors and memory: its flows stall while the new process starts,
its siblings notice nothing. The first replacement is immediate; one that dies within ``STABLE_S`` of its start waits
``BACKOFF_S`` before the next, so that a crash at start does not spin.

If the template dies, the workers go on; a new template is started, and only a replacement waits for it.

Run by the supervisor's event loop alone. The announced epochs of the workers are the ``readers`` of the tables'
writer; a worker that is not running holds no reference (``ASLEEP``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from appliance import limits
from appliance.config import Config
from appliance.dataplane import flow, memory, misses
from appliance.dataplane.balance import sticky
from appliance.dataplane.source import MODES
from appliance.environment.tun import TunDevice
from appliance.observe import counters
from appliance.supervisor import reports
from appliance.supervisor.sockets import WorkerSockets
from appliance.supervisor.template import Spawn
from appliance.tables import segment
from appliance.tables.layout import IPAddress
from appliance.tables.publish import ASLEEP, Publisher

log = logging.getLogger(__name__)

STABLE_S = 1.0
BACKOFF_S = 0.5
TEMPLATE_READY_S = 180.0  # a cold cache is compiled first
_MESSAGE_MAX = 65_536


@dataclass
class Worker:
    """One worker: what outlives its process, and the process of the moment."""

    index: int
    cpu: int
    queue: int
    sockets: WorkerSockets
    fds: dict[str, int]
    records: Any
    counters: Any
    control: Any
    messages: Any
    reports: reports.Reports
    wake: int
    pid: int = 0
    started: float = 0.0
    restarts: int = -1
    running: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def close(self) -> None:
        """Give up its memory and sockets."""
        for fd in self.fds.values():
            os.close(fd)
        os.close(self.wake)
        self.reports.close()
        self.sockets.close()


def cpus_of(config: Config) -> list[int]:
    """The CPU of each worker, by index; -1 where workers are not pinned."""
    cpus = list(config.workers.cpus) or sorted(os.sched_getaffinity(0))
    count = config.workers.count or len(cpus)
    return [cpus[i % len(cpus)] if config.workers.pin else -1 for i in range(count)]


def new_worker(index: int, cpu: int, queue: int, sockets: WorkerSockets, flows: int) -> Worker:
    """A worker's memory, before its first process."""
    layouts: dict[str, list[segment.Section]] = {
        "records": [("records", flow.FLOW, flows)],
        "counters": counters.SECTIONS,
        "control": memory.SECTIONS,
        "misses": misses.SECTIONS,
    }
    fds = {name: segment.create(f"edge-{name}-{index}", sections) for name, sections in layouts.items()}
    records, counts, control, ring = (segment.arrays(fds[n], layouts[n], writable=True)[n] for n in layouts)
    counts[counters.ANNOUNCED] = ASLEEP
    wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    return Worker(index, cpu, queue, sockets, fds, records, counts, control, ring, reports.Reports(ring), wake)


class WorkerPool:
    """Starts, watches and replaces the workers."""

    def __init__(self, config: Config, tun: TunDevice, sockets: list[WorkerSockets]) -> None:
        cpus = cpus_of(config)
        self._config = config
        self._workers = [
            new_worker(i, cpu, tun.descriptors[i], sockets[i], config.workers.flows) for i, cpu in enumerate(cpus)
        ]
        self._handoff_ports = tuple(s.handoff_port for s in sockets)
        self._guests: list[Any] = []
        self.sticky = segment.create("edge-sticky", sticky.SECTIONS)
        self.seed = int.from_bytes(os.urandom(7), "little")
        self._offloads: dict[str, bool] = {}
        self._publisher: Publisher | None = None
        self._template: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._statuses: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = asyncio.Event()
        self._stopping = False
        self.on_miss: Callable[[IPAddress], None] = self._nobody_knows
        """Called in the event loop for each address that a worker lacks; may repeat. ``answered`` ends the waiting.
        Until somebody sets it, nobody can be asked."""
        self.on_too_big: Callable[[IPAddress], None] = lambda _node: None
        """Called in the event loop for a node whose path is narrower than its entry says; may repeat."""

    @property
    def workers(self) -> list[Worker]:
        """All workers, by index."""
        return self._workers

    def announced(self) -> Iterable[int]:
        """Epochs that the workers announced (the ``readers`` of the tables)."""
        words = (*(worker.counters for worker in self._workers), *self._guests)
        return (int(it[counters.ANNOUNCED]) for it in words)

    def wake(self) -> None:
        """Have every worker begin a batch, whether it has packets or not."""
        for worker in self._workers:
            os.eventfd_write(worker.wake, 1)

    @contextmanager
    def guest(self, words: Any) -> Iterator[None]:
        """Within the block, whoever has these counters reads the tables too."""
        self._guests.append(words)
        try:
            yield
        finally:
            self._guests = [it for it in self._guests if it is not words]

    async def start(self, publisher: Publisher, *, udp_gso: bool, coalesce: bool) -> None:
        """Start the template and all workers; returns when all run. Raises RuntimeError or TimeoutError."""
        self._publisher = publisher
        self._offloads = {"udp_gso": udp_gso, "coalesce": coalesce}
        self._spawn_task(self._keep_template())
        await asyncio.wait_for(self._ready.wait(), TEMPLATE_READY_S)
        for worker in self._workers:
            self._listen(worker)
            self._request(worker)
        async with asyncio.timeout(limits.WORKER_EXIT_S + TEMPLATE_READY_S):
            for worker in self._workers:
                await worker.running.wait()

    def _spawn_task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- misses --------------------------------------------------------------------------------------------------

    def _listen(self, worker: Worker) -> None:
        """Have a worker's reports read as they come."""
        asyncio.get_running_loop().add_reader(worker.reports.descriptor, self._report, worker)

    def _report(self, worker: Worker) -> None:
        for kind, address in worker.reports.take():
            if kind == misses.ADDRESS:
                self.on_miss(address)
            else:
                self.on_too_big(address)

    def _nobody_knows(self, address: IPAddress) -> None:
        self.answered(address, found=False)

    def answered(self, address: IPAddress, found: bool) -> None:
        """Say that the tables have an address now, or that nobody has it, to the workers that wait for it."""
        for worker in self._workers:
            if not found:
                reports.refuse(worker.control, address)
            os.eventfd_write(worker.wake, 1)

    # --- template ------------------------------------------------------------------------------------------------

    async def _keep_template(self) -> None:
        """Start the template, and again whenever it ends."""
        while not self._stopping:
            started = time.monotonic()
            await self._run_template()
            if not self._stopping:
                log.error("worker template ended", extra={"after_s": round(time.monotonic() - started, 1)})
                await asyncio.sleep(BACKOFF_S)

    async def _run_template(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._template = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "appliance.supervisor.template",
            str(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._control = ours
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), self._receive, ours)
        try:
            await self._template.wait()
        finally:
            loop.remove_reader(ours.fileno())
            self._ready.clear()
            self._control = None
            ours.close()

    def _receive(self, control: socket.socket) -> None:
        """Handle one message of the template."""
        try:
            data, fds, _, _ = socket.recv_fds(control, _MESSAGE_MAX, 8)
        except (BlockingIOError, ConnectionResetError):
            return
        if not data:
            asyncio.get_running_loop().remove_reader(control.fileno())
            return
        message = json.loads(data)
        if "ready" in message:
            log.info("worker template ready", extra={"seconds": message["ready"]})
            self._ready.set()
        elif "spawned" in message:
            self._started(self._workers[message["spawned"]], message["pid"], fds[0])
        elif "exited" in message:
            self._statuses[message["exited"]] = message["status"]

    # --- processes -----------------------------------------------------------------------------------------------

    def _request(self, worker: Worker) -> None:
        """Ask the template for a process."""
        assert self._publisher is not None
        assert self._control is not None
        capacity = self._publisher.capacity
        spawn = Spawn(
            worker.index,
            len(self._workers),
            worker.cpu,
            self._config.tunnel.port,
            capacity.hosts,
            capacity.services,
            capacity.choices,
            capacity.maglev,
            capacity.nodes,
            self._config.workers.flows,
            self._offloads["udp_gso"],
            self._offloads["coalesce"],
            self._handoff_ports,
            self.seed,
            MODES[self._config.tunnel.learn_hosts],
            self._config.workers.busy_poll * 1_000,
        )
        tables = self._publisher.descriptor()
        socks = worker.sockets
        fds = [tables, *(worker.fds[name] for name in ("records", "counters", "control", "misses")), worker.queue]
        fds += [socks.wire.fileno(), socks.handoff.fileno(), worker.wake, worker.reports.descriptor]
        fds += [socks.fragmenting.fileno(), self.sticky]
        fds += [sock.fileno() for sock in socks.sources]
        try:
            socket.send_fds(self._control, [spawn.encode()], fds)
        finally:
            os.close(tables)

    def _started(self, worker: Worker, pid: int, pidfd: int) -> None:
        worker.pid, worker.started = pid, time.monotonic()
        worker.restarts += 1
        worker.ended.clear()
        worker.running.set()
        log.info("worker started", extra={"worker": worker.index, "pid": pid, "cpu": worker.cpu})
        asyncio.get_running_loop().add_reader(pidfd, self._ended, worker, pidfd)

    def _ended(self, worker: Worker, pidfd: int) -> None:
        """A worker's process is gone: replace it, unless we are stopping."""
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        worker.counters[counters.ANNOUNCED] = ASLEEP
        worker.running.clear()
        worker.ended.set()
        pid, worker.pid = worker.pid, 0
        if self._stopping:
            return
        log.error("worker ended", extra={"worker": worker.index, "pid": pid, "status": self._statuses.pop(pid, None)})
        early = time.monotonic() - worker.started < STABLE_S
        self._spawn_task(self._replace(worker, BACKOFF_S if early and worker.restarts > 0 else 0.0))

    async def _replace(self, worker: Worker, delay: float) -> None:
        if delay:
            await asyncio.sleep(delay)
        await self._ready.wait()
        if not self._stopping:
            self._request(worker)

    # --- end -----------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stop the workers and the template; those that do not listen are killed."""
        self._stopping = True
        for worker in self._workers:
            asyncio.get_running_loop().remove_reader(worker.reports.descriptor)
            worker.control[memory.STOP] = 1
            os.eventfd_write(worker.wake, 1)
        for worker in self._workers:
            await self._stop_worker(worker)
        if self._control is not None:
            self._control.shutdown(socket.SHUT_RDWR)
        if self._template is not None and self._template.returncode is None:
            await self._stop_template(self._template)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stop_worker(self, worker: Worker) -> None:
        if not worker.pid:
            return
        try:
            await asyncio.wait_for(worker.ended.wait(), limits.WORKER_EXIT_S)
        except TimeoutError:
            log.error("worker did not stop, killed", extra={"worker": worker.index, "pid": worker.pid})
            os.kill(worker.pid, signal.SIGKILL)
            await worker.ended.wait()

    async def _stop_template(self, template: asyncio.subprocess.Process) -> None:
        try:
            await asyncio.wait_for(template.wait(), limits.WORKER_EXIT_S)
        except TimeoutError:
            template.kill()
            await template.wait()

    def close(self) -> None:
        """Give up all memory and sockets of the workers."""
        os.close(self.sticky)
        for worker in self._workers:
            worker.close()
