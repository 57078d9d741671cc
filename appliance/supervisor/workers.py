"""The workers of this node: their memory and descriptors, their start, watch and replacement.

Theory of operation
-------------------
The pool owns, for each worker, what must outlive it: TUN queue, sockets, flow records, counters; and for
all of them the table of sticky clients. The processes are
forked by the template (``supervisor.template``) and watched through pidfds, so a death is noticed at once, whoever
reaps it. A dead worker is replaced on the same descriptors and memory: its flows stall while the new process starts,
its siblings notice nothing. The first replacement is immediate; one that dies within ``STABLE_S`` of its start waits
``BACKOFF_S`` before the next, so that a crash at start does not spin.

If the template dies, the workers go on; a new template is started, and only a replacement waits for it. Whichever
template becomes ready is asked for every worker that has no process (``requested`` until it answers, or ends), so none
is lost with the template that was asked for it. A template that cannot be started is tried again after ``BACKOFF_S``.

What is owned here is kept by others too (``supervisor.estate``), so that it outlives the supervisor: ``release`` leaves
everything running, and the pool of the next one takes it over. ``renew`` replaces the workers on purpose, one at a
time: each on the same queue, sockets, flows and counters, when the one before it has ended. If a supervisor begins with
that (other code), the template before stays where the next supervisor looks until ours has everything.

Run by the supervisor's event loop alone. The announced epochs of the workers are the ``readers`` of the tables'
writer; a worker that is not running holds no reference (``ASLEEP``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from appliance import limits, privileges
from appliance.config import Config
from appliance.dataplane import flow, memory, misses
from appliance.dataplane.balance import sticky
from appliance.dataplane.source import MODES
from appliance.environment.tun import TunDevice
from appliance.observe import counters
from appliance.supervisor import estate, record, reports
from appliance.supervisor.estate import Estate, Keepers
from appliance.supervisor.notify import Systemd
from appliance.supervisor.sockets import WorkerSockets
from appliance.supervisor.template import Spawn, process_name
from appliance.tables import segment
from appliance.tables.layout import IPAddress
from appliance.tables.publish import ASLEEP, Publisher
from appliance.tasks import end

log = logging.getLogger(__name__)

STABLE_S = 1.0
BACKOFF_S = 0.5
TEMPLATE_READY_S = 180.0  # a cold cache is compiled first
_MESSAGE_MAX = 65_536
MEMORY: Final = ("records", "counters", "control", "misses")
"""A worker's own segments."""


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
    pidfd: int = -1
    requested: bool = False
    renewing: bool = False
    started: float = 0.0
    restarts: int = -1
    running: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def named(self) -> dict[str, int]:
        """What must outlive its process, and us."""
        mine = {"tun": self.queue, "wake": self.wake, "missed": self.reports.descriptor}
        return {f"{self.index}.{name}": fd for name, fd in (mine | self.fds | self.sockets.named()).items()}

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


def _layouts(flows: int) -> dict[str, list[segment.Section]]:
    """What each of ``MEMORY`` holds."""
    return {
        "records": [("records", flow.FLOW, flows)],
        "counters": counters.SECTIONS,
        "control": memory.SECTIONS,
        "misses": misses.SECTIONS,
    }


def new_worker(index: int, cpu: int, queue: int, sockets: WorkerSockets, flows: int) -> Worker:
    """A worker's memory, before its first process."""
    layouts = _layouts(flows)
    fds = {name: segment.create(f"edge-{name}-{index}", sections) for name, sections in layouts.items()}
    records, counts, control, ring = (segment.arrays(fds[n], layouts[n], writable=True)[n] for n in layouts)
    counts[counters.ANNOUNCED] = ASLEEP
    wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    return Worker(index, cpu, queue, sockets, fds, records, counts, control, ring, reports.Reports(ring), wake)


def adopted_worker(index: int, cpu: int, queue: int, sockets: WorkerSockets, flows: int, left: Estate) -> Worker:
    """A worker's memory as another supervisor made it. Raises KeyError or ValueError if it is not complete.

    Whoever captured packets or profiled through the one before is gone.
    """
    layouts = _layouts(flows)
    fds = {name: left.take(f"{index}.{name}") for name in layouts}
    records, counts, control, ring = (segment.arrays(fds[n], layouts[n], writable=True)[n] for n in layouts)
    control[memory.CAPTURE] = control[memory.STAGED] = 0
    reading = reports.Reports(ring, left.take(f"{index}.missed"))
    return Worker(index, cpu, queue, sockets, fds, records, counts, control, ring, reading, left.take(f"{index}.wake"))


class WorkerPool:
    """Starts, watches and replaces the workers."""

    def __init__(
        self,
        config: Config,
        tun: TunDevice,
        sockets: list[WorkerSockets],
        left: Estate | None = None,
        systemd: Systemd | None = None,
        note: Callable[[str, int], None] = lambda _name, _pid: None,
    ) -> None:
        """``left``: what another supervisor left, with which this one goes on; it must fit (``estate.verdict``).
        ``note`` is told of each process (``record``)."""
        cpus, flows = cpus_of(config), config.workers.flows
        self._config = config
        self._left = left
        self._note = note
        made = zip(cpus, tun.descriptors, sockets, strict=True)
        self._workers = [
            new_worker(i, *it, flows) if left is None else adopted_worker(i, *it, flows, left)
            for i, it in enumerate(made)
        ]
        self._handoff_ports = tuple(s.handoff_port for s in sockets)
        self._guests: list[Any] = []
        self.sticky = segment.create("edge-sticky", sticky.SECTIONS) if left is None else left.take("sticky")
        self.seed = int.from_bytes(os.urandom(7), "little") if left is None else int(left.manifest["seed"])
        self._user = privileges.identity(config.workers.user, privileges.WORKER_UID, "workers.user")
        self.keepers = Keepers(systemd or Systemd({}), self._tell)
        """Who keeps what must outlive the supervisor."""
        self._offloads: dict[str, bool] = {}
        self._publisher: Publisher | None = None
        self._template: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._retired: socket.socket | None = None
        self._is_first = True
        """Whether the next supervisor is to find our template, and not one that has it all already."""
        self._gone = asyncio.Event()
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

    async def start(self, publisher: Publisher, *, udp_gso: bool, coalesce: bool, renew: bool = False) -> None:
        """Start template and workers, or take over those that run; returns when all run.

        ``renew``: those that run are of other code or settings, and are to be replaced by others of a template of
        ours. Raises RuntimeError or TimeoutError.
        """
        self._publisher = publisher
        self._offloads = {"udp_gso": udp_gso, "coalesce": coalesce}
        self.keepers.keep({"tables": publisher.memory, "sticky": self.sticky})
        for worker in self._workers:
            self.keepers.keep(worker.named())
            self._listen(worker)
        self.adopt()
        template = None if self._left is None else self._left.control
        if renew:
            self._retired, template = template, None
            self._is_first = self._retired is None
        self._spawn_task(self._keep_template(template))
        if renew or not all(worker.pid for worker in self._workers):
            await asyncio.wait_for(self._ready.wait(), TEMPLATE_READY_S)
        async with asyncio.timeout(limits.WORKER_EXIT_S + TEMPLATE_READY_S):
            for worker in self._workers:
                await worker.running.wait()
        self.keepers.describe(estate.manifest(self._config, len(self._workers), self.seed))
        if renew:
            self._hand_over()
            self._spawn_task(self._renew_all())

    def adopt(self) -> None:
        """Watch the workers that another supervisor left running; once is enough. From then on their epochs count."""
        left = {} if self._left is None else self._left.held
        for worker in self._workers:
            pidfd = left.pop(process_name(worker.index), -1)
            if pidfd >= 0 and (pid := pid_of(pidfd)) > 0:
                self._watch(worker, pid, pidfd)
            elif pidfd >= 0:
                os.close(pidfd)
            if not worker.pid and not worker.running.is_set():
                self.keepers.drop(process_name(worker.index))
                worker.counters[counters.ANNOUNCED] = ASLEEP

    def _hand_over(self) -> None:
        """Our template has everything: the next supervisor is to find it. From now on the one before ends, and its
        workers with it, if we die: the next one would take them for workers of ours."""
        if self._retired is None:
            return
        self._is_first = True
        try:
            estate.show(self._config.paths.runtime)
            self._retired.send(json.dumps({"manifest": None}).encode())
        except OSError as error:
            log.warning("a restart may find the template before", extra={"error": str(error)})

    async def _renew_all(self) -> None:
        await self.renew()
        if self._retired is not None:
            with suppress(OSError):
                self._retired.send(json.dumps({"leave": True}).encode())
            self._retired.close()
            self._retired = None

    async def renew(self) -> None:
        """Replace all workers, one at a time. Flows and counters stay; packets wait meanwhile."""
        await self._ready.wait()
        for worker in self._workers:
            if worker.running.is_set():
                worker.renewing = True
                await self._end_worker(worker)
            async with asyncio.timeout(TEMPLATE_READY_S):
                await worker.running.wait()

    def _spawn_task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("ended", extra={"task": task.get_name()}, exc_info=error)

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

    def _tell(self, message: dict[str, Any], fds: list[int]) -> None:
        """Say something to the template, if there is one. What it must know it is told again when it is ready."""
        if self._control is None or not self._ready.is_set():
            return
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)
        except OSError as error:  # it has ended, and its end is being waited for; or its buffer is full
            log.warning("the worker template does not listen", extra={"error": str(error)})

    async def _keep_template(self, control: socket.socket | None) -> None:
        """Start the template, and again whenever it ends; at first there may be one already."""
        while not self._stopping:
            started = time.monotonic()
            try:
                await (self._run_template() if control is None else self._follow(control, is_ready=True))
            except OSError as error:
                log.error("cannot start the worker template, trying again", extra={"error": str(error)})
            control = None
            if not self._stopping:
                log.error("worker template ended", extra={"after_s": round(time.monotonic() - started, 1)})
                await asyncio.sleep(BACKOFF_S)

    async def _run_template(self) -> None:
        """Start a template, and speak with it until it ends. Raises OSError if it cannot be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs, self._new_listener() as listener:
            self._template = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "appliance.supervisor.template",
                str(theirs.fileno()),
                str(listener.fileno()),
                pass_fds=[theirs.fileno(), listener.fileno()],
                start_new_session=True,
            )
            theirs.close()
            listener.close()
            self._note(record.TEMPLATE, self._template.pid)
            await self._follow(ours, is_ready=False)
        await self._template.wait()

    def _new_listener(self) -> socket.socket:
        """Where the next supervisor finds the template; where nothing can be written, nobody will."""
        try:
            return estate.listener(self._config.paths.runtime, beside=not self._is_first)
        except OSError as error:
            log.warning("a restart will begin anew", extra={"error": str(error)})
            nowhere = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            nowhere.bind("")  # a name that the kernel chooses
            nowhere.listen()
            return nowhere

    async def _follow(self, control: socket.socket, *, is_ready: bool) -> None:
        """Speak with a template until it ends."""
        control.setblocking(False)
        self._control, self._gone = control, asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(control.fileno(), self._receive, control)
        if is_ready:
            self._template_ready()
        try:
            await self._gone.wait()
        finally:
            loop.remove_reader(control.fileno())
            self._ready.clear()
            self._control = None
            for worker in self._workers:
                worker.requested = False
            control.close()

    def _template_ready(self) -> None:
        self._ready.set()
        self.keepers.tell_again()
        for worker in self._workers:
            if not worker.pid:
                self._spawn_task(self._replace(worker, 0.0))

    def _receive(self, control: socket.socket) -> None:
        """Handle one message of the template."""
        try:
            data, fds, _, _ = socket.recv_fds(control, _MESSAGE_MAX, 8)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(control.fileno())
            self._gone.set()
            return
        message = json.loads(data)
        if "ready" in message:
            log.info("worker template ready", extra={"seconds": message["ready"]})
            self._template_ready()
        elif "spawned" in message:
            self._started(self._workers[message["spawned"]], message["pid"], fds[0])
        elif "exited" in message:
            self._statuses[message["exited"]] = message["status"]

    # --- processes -----------------------------------------------------------------------------------------------

    def _request(self, worker: Worker) -> None:
        """Ask the template for a process. It may not listen: then ``requested`` stays as it is."""
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
            *self._user,
        )
        worker.control[memory.STOP] = 0
        tables = self._publisher.descriptor()
        socks = worker.sockets
        fds = [tables, *(worker.fds[name] for name in MEMORY), worker.queue]
        fds += [socks.wire.fileno(), socks.handoff.fileno(), worker.wake, worker.reports.descriptor]
        fds += [socks.fragmenting.fileno(), self.sticky]
        fds += [sock.fileno() for sock in socks.sources]
        try:
            socket.send_fds(self._control, [spawn.encode()], fds)
            worker.requested = True
        except OSError as error:  # it has ended, and its end is being waited for; or its buffer is full
            log.warning("the worker template takes no request", extra={"worker": worker.index, "error": str(error)})
        finally:
            os.close(tables)

    def _started(self, worker: Worker, pid: int, pidfd: int) -> None:
        worker.restarts += 1
        worker.requested = False
        log.info("worker started", extra={"worker": worker.index, "pid": pid, "cpu": worker.cpu})
        self._watch(worker, pid, pidfd)

    def _watch(self, worker: Worker, pid: int, pidfd: int) -> None:
        """A worker has a process."""
        worker.pid, worker.pidfd, worker.started = pid, pidfd, time.monotonic()
        worker.restarts = max(0, worker.restarts)
        self._note(record.worker(worker.index), pid)
        self.keepers.keep({process_name(worker.index): pidfd})
        worker.ended.clear()
        worker.running.set()
        asyncio.get_running_loop().add_reader(pidfd, self._ended, worker, pidfd)

    def _ended(self, worker: Worker, pidfd: int) -> None:
        """A worker's process is gone: replace it, unless we are stopping."""
        asyncio.get_running_loop().remove_reader(pidfd)
        self.keepers.drop(process_name(worker.index))
        os.close(pidfd)
        worker.counters[counters.ANNOUNCED] = ASLEEP
        worker.running.clear()
        worker.ended.set()
        pid, worker.pid, worker.pidfd = worker.pid, 0, -1
        if self._stopping:
            return
        early = time.monotonic() - worker.started < STABLE_S and worker.restarts > 0 and not worker.renewing
        said = {"worker": worker.index, "pid": pid, "status": self._statuses.pop(pid, None)}
        log.log(logging.INFO if worker.renewing else logging.ERROR, "worker ended", extra=said)
        worker.renewing = False
        self._spawn_task(self._replace(worker, BACKOFF_S if early else 0.0))

    async def _replace(self, worker: Worker, delay: float) -> None:
        """Ask for a process until a template has taken the request. Several may try: one asks."""
        await asyncio.sleep(delay)
        while not self._stopping:
            await self._ready.wait()
            if worker.pid or worker.requested:
                return
            if self._control is not None:
                self._request(worker)
            if not worker.requested:
                await asyncio.sleep(BACKOFF_S)

    # --- end -----------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stop the workers and the template; those that do not listen are killed."""
        self._stopping = True
        self.keepers.clear()
        for worker in self._workers:
            asyncio.get_running_loop().remove_reader(worker.reports.descriptor)
        await asyncio.gather(*(self._end_worker(worker) for worker in self._workers))
        for control in (self._control, self._retired):
            if control is not None:
                with suppress(OSError):  # it has ended already
                    control.send(json.dumps({"leave": True}).encode())
        if self._control is not None:
            await self._stop_template()
        await self._end_tasks()

    async def release(self) -> None:
        """Leave template and workers to the next supervisor, which finds them as they are."""
        self._stopping = True
        for worker in self._workers:
            asyncio.get_running_loop().remove_reader(worker.reports.descriptor)
        await self._end_tasks()

    async def is_kept(self, seconds: float) -> bool:
        """Whether a template has, within this time, what the next supervisor needs."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), seconds)
        return self._ready.is_set()

    def keep_connection(self, descriptor: int | None) -> None:
        """Have the connection to the cluster outlive us; None: there is none."""
        if descriptor is None:
            self.keepers.drop("broker")
        else:
            self.keepers.keep({"broker": descriptor})

    def kill_stuck(self, epoch: int) -> None:
        """End the workers that have not begun a batch since an epoch, before ``start``."""
        for worker in self._workers:
            if worker.pidfd >= 0 and worker.counters[counters.ANNOUNCED] < epoch:
                log.error("worker is stuck, killed", extra={"worker": worker.index, "pid": worker.pid})
                assert self._left is not None
                self._left.kill(worker.pidfd)

    def kill(self, pidfd: int) -> None:
        """End a process that may be another user's."""
        self._tell({"kill": True}, [pidfd])

    async def _end_tasks(self) -> None:
        await end(self._tasks)

    async def _end_worker(self, worker: Worker) -> None:
        """Have a worker end; one that does not listen is killed, by the template, as it is another user's."""
        if not worker.pid:
            return
        worker.control[memory.STOP] = 1
        os.eventfd_write(worker.wake, 1)
        try:
            await asyncio.wait_for(worker.ended.wait(), limits.WORKER_EXIT_S)
        except TimeoutError:
            log.error("worker did not stop, killed", extra={"worker": worker.index, "pid": worker.pid})
            self.kill(worker.pidfd)
            await worker.ended.wait()

    async def _stop_template(self) -> None:
        try:
            await asyncio.wait_for(self._gone.wait(), limits.WORKER_EXIT_S)
            if self._template is not None:
                await asyncio.wait_for(self._template.wait(), limits.WORKER_EXIT_S)
        except TimeoutError:
            if self._template is not None:
                self._template.kill()
                await self._template.wait()

    def close(self) -> None:
        """Give up all memory and sockets of the workers."""
        os.close(self.sticky)
        for worker in self._workers:
            worker.close()


def pid_of(pidfd: int) -> int:
    """The process of a pidfd; -1 if it has ended."""
    with Path(f"/proc/self/fdinfo/{pidfd}").open() as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("Pid:")), -1)
