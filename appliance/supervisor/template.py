"""The worker template: a process that has imported and compiled everything, and forks workers on request.

Theory of operation
-------------------
Started by the supervisor (``python -m appliance.supervisor.template FD``) with one end of a SOCK_SEQPACKET pair. It
warms up (imports, compiled kernels from the cache), says ``ready``, and waits. A request is one JSON message with the
worker's settings and its descriptors (SCM_RIGHTS); the template forks, and answers with the child's pid and a pidfd
that was opened before the child could be reaped. The child inherits the warm pages, so it is forwarding within
milliseconds.

It never touches packets and keeps no descriptor of a worker. Children that end are reaped and reported. When the
supervisor closes its end, or dies, the template stops its workers and ends.

Messages to it:   {"spawn": INDEX, "settings": {...}} + descriptors in the order of ``DESCRIPTORS``
Messages from it: {"ready": SECONDS} · {"spawned": INDEX, "pid": PID} + pidfd · {"exited": PID, "status": WAITSTATUS}
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_MEMORY = ("tables", "records", "counters", "control", "misses")
DESCRIPTORS = (*_MEMORY, "tun", "wire", "handoff", "wake", "missed", "fragmenting", "sticky")
"""In this order, and then the sources."""
_FDS_MAX = 128
_MESSAGE_MAX = 65_536


@dataclass(frozen=True)
class Spawn:
    """What a worker is told: everything but its descriptors."""

    index: int
    workers: int
    cpu: int  # -1: not pinned
    port: int
    hosts: int
    services: int
    choices: int
    maglev: int
    nodes: int
    flows: int
    udp_gso: bool
    coalesce: bool
    handoff_ports: tuple[int, ...]
    seed: int
    learn: int
    busy_ns: int

    def encode(self) -> bytes:
        """The message of the request."""
        return json.dumps({"spawn": self.index, "settings": asdict(self)}).encode()

    @classmethod
    def decode(cls, settings: dict[str, Any]) -> Spawn:
        """The request of a message's settings."""
        return cls(**{**settings, "handoff_ports": tuple(settings["handoff_ports"])})


class Template:
    """The template's loop."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: set[int] = set()
        self._wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the supervisor's to handle

    def run(self) -> None:
        """Serve requests until the supervisor closes its end."""
        while True:
            ready, _, _ = select.select([self._control.fileno(), self._wake_read], [], [])
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._serve():
                self._stop()
                return

    def _serve(self) -> bool:
        """Carry out one request; False if there will be no more."""
        data, fds, _, _ = socket.recv_fds(self._control, _MESSAGE_MAX, _FDS_MAX)
        if not data:
            return False
        spawn = Spawn.decode(json.loads(data)["settings"])
        pid = os.fork()
        if pid == 0:
            _become_worker(spawn, fds)
        pidfd = os.pidfd_open(pid)
        self._children.add(pid)
        for fd in fds:
            os.close(fd)
        self._send({"spawned": spawn.index, "pid": pid}, [pidfd])
        os.close(pidfd)
        return True

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.discard(pid)
            self._send({"exited": pid, "status": status}, [])

    def _send(self, message: dict[str, Any], fds: list[int]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the supervisor is gone; the next read says so
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)

    def _stop(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        while self._children:
            self._children.discard(os.wait()[0])


def _become_worker(spawn: Spawn, fds: list[int]) -> None:
    """In the child: forward packets until told to stop, then leave without any clean-up of the template's state."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _name_process(f"edge-worker-{spawn.index}")
        if spawn.cpu >= 0:
            os.sched_setaffinity(0, {spawn.cpu})
        _forward(spawn, fds)
        os._exit(0)
    except BaseException as error:  # nothing may escape into the template's loop
        sys.stderr.write(f"worker {spawn.index}: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(1)


def _forward(spawn: Spawn, fds: list[int]) -> None:
    from appliance.dataplane import flow, memory, misses, sleep, state, worker
    from appliance.dataplane.balance import sticky
    from appliance.observe import counters
    from appliance.tables import layout, read, segment

    named = dict(zip(DESCRIPTORS, fds, strict=False))
    sources = tuple(fds[len(DESCRIPTORS) :])
    capacity = layout.Capacity(spawn.hosts, spawn.services, spawn.choices, spawn.maglev, spawn.nodes)
    tables = read.attach(named["tables"], capacity)
    records = segment.arrays(named["records"], [("records", flow.FLOW, spawn.flows)], writable=True)["records"]
    counts = segment.arrays(named["counters"], counters.SECTIONS, writable=True)["counters"]
    control = segment.arrays(named["control"], memory.SECTIONS, writable=False)["control"]
    reports = segment.arrays(named["misses"], misses.SECTIONS, writable=True)["misses"]
    clients = segment.arrays(named["sticky"], sticky.SECTIONS, writable=True)["sticky"]
    settings = state.Settings(
        index=spawn.index,
        workers=spawn.workers,
        port=spawn.port,
        udp_gso=spawn.udp_gso,
        coalesce=spawn.coalesce,
        handoff_ports=spawn.handoff_ports,
        seed=spawn.seed,
        learn=spawn.learn,
        busy_ns=spawn.busy_ns,
    )
    epoll = sleep.descriptor(named["tun"], named["wire"], named["handoff"], named["wake"])
    descriptors = state.Descriptors(
        named["tun"],
        named["wire"],
        named["handoff"],
        epoll,
        sources,
        missed=named["missed"],
        fragmenting=named["fragmenting"],
    )
    made = state.make(settings, descriptors, tables, records, counts, control, reports, clients)
    worker.work(made.record)


def _name_process(name: str) -> None:
    """What ``ps`` and ``top`` show."""
    Path("/proc/self/comm").write_text(name)


def main() -> None:
    """Entry of the process."""
    started = time.monotonic()
    control = socket.socket(fileno=int(sys.argv[1]))
    _name_process("edge-template")
    from appliance.supervisor.warm import compile_kernels

    compile_kernels()
    gc.collect()
    gc.freeze()  # the collector must not touch, and so unshare, what the children inherit
    template = Template(control)
    control.send(json.dumps({"ready": round(time.monotonic() - started, 3)}).encode())
    template.run()


if __name__ == "__main__":
    main()
