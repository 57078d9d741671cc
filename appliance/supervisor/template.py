"""The worker template: a process that has imported and compiled everything, forks workers, and keeps what they need.

Theory of operation
-------------------
Started by the supervisor (``python -m appliance.supervisor.template FD LISTENER``) with one end of a SOCK_SEQPACKET
pair and a listening socket of that kind (``paths.runtime/holder.sock``, mode 0600). It warms up (imports, compiled
kernels from the cache), says ``ready``, and waits. A request is one JSON message with the worker's settings and its
descriptors (SCM_RIGHTS); the template forks, and answers with the child's pid and a pidfd that was opened before the
child could be reaped. The child inherits the warm pages, so it is forwarding within milliseconds. It closes every
descriptor that is not its own, and gives up all privileges before it reads the first packet (``privileges``).

It never touches packets. It *keeps*, by name, the descriptors that must outlive the supervisor, each worker's pidfd
among them, and a manifest that says what they are. If the supervisor goes away without a word, killed or
restarted, template and workers go on. The next one connects to the listener and is given everything; while one is
connected, another is told ``busy``. A template that was told to ``leave``, or that loses its supervisor before it was
given a manifest, stops its workers and ends.

Messages to it:   {"spawn": INDEX, "settings": {...}} + descriptors in the order of ``DESCRIPTORS``
                  {"hold": [NAME, ...]} + descriptors · {"drop": [NAME, ...]} · {"manifest": {...}}
                  {"kill": true} + pidfd, as only we can become the user that it belongs to · {"leave": true}
Messages from it: {"ready": SECONDS} · {"spawned": INDEX, "pid": PID} + pidfd · {"exited": PID, "status": WAITSTATUS}
                  to one that connects: {"busy": true}, or {"manifest": {...}}, then {"held": [NAME, ...]} +
                  descriptors as often as it takes, then {"end": true}
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_MEMORY = ("tables", "records", "counters", "control", "misses")
DESCRIPTORS = (*_MEMORY, "tun", "wire", "handoff", "wake", "missed", "fragmenting", "sticky")
"""In this order, and then the sources."""
_DESCRIPTOR_MAX = 1 << 20
_FDS_MAX = 128
_MESSAGE_MAX = 65_536
HELD_EACH = 64
"""Descriptors of one message (SCM_MAX_FD is 253)."""


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
    uid: int
    gid: int

    def encode(self) -> bytes:
        """The message of the request."""
        return json.dumps({"spawn": self.index, "settings": asdict(self)}).encode()

    @classmethod
    def decode(cls, settings: dict[str, Any]) -> Spawn:
        """The request of a message's settings."""
        return cls(**{**settings, "handoff_ports": tuple(settings["handoff_ports"])})


class Template:
    """The template's loop."""

    def __init__(self, control: socket.socket, listener: socket.socket) -> None:
        self._control: socket.socket | None = control
        self._listener = listener
        self._children: dict[int, int] = {}
        self._held: dict[str, int] = {}
        self._manifest: dict[str, Any] | None = None
        self._wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the supervisor's to handle

    def run(self) -> None:
        """Serve requests until told to leave."""
        while True:
            control = self._control
            sources = [self._wake_read, self._listener.fileno(), *([] if control is None else [control.fileno()])]
            ready, _, _ = select.select(sources, [], [])
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
                self._reap()
            if control is not None and control.fileno() in ready and not self._serve(control):
                self._stop()
                return
            if self._listener.fileno() in ready:
                self._accept()

    def _serve(self, control: socket.socket) -> bool:
        """Carry out one request; False if there will be no more."""
        try:
            data, fds, _, _ = socket.recv_fds(control, _MESSAGE_MAX, _FDS_MAX)
        except ConnectionError:
            data, fds = b"", []
        if not data:
            control.close()
            self._control = None
            return self._manifest is not None
        match json.loads(data):
            case {"spawn": _, "settings": settings}:
                self._spawn(Spawn.decode(settings), fds)
            case {"hold": names}:
                self._hold(dict(zip(names, fds, strict=True)))
            case {"drop": names}:
                self._drop(names)
            case {"manifest": manifest}:
                self._manifest = manifest
            case {"kill": _}:
                self._kill(fds)
            case {"leave": _}:
                return False
        return True

    def _spawn(self, spawn: Spawn, fds: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            _become_worker(spawn, fds)
        pidfd = os.pidfd_open(pid)
        self._children[pid] = spawn.index
        for fd in fds:
            os.close(fd)
        self._send({"spawned": spawn.index, "pid": pid}, [pidfd])
        self._hold({process_name(spawn.index): pidfd})

    def _hold(self, named: dict[str, int]) -> None:
        self._drop(named.keys() & self._held.keys())
        self._held.update(named)

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            if (fd := self._held.pop(name, None)) is not None:
                os.close(fd)

    def _kill(self, fds: list[int]) -> None:
        for fd in fds:
            kill_as_its_user(fd)
            os.close(fd)

    def _accept(self) -> None:
        """Another supervisor: give it everything, unless there is one."""
        caller, _ = self._listener.accept()
        _, uid, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.geteuid() or self._control is not None:
            with contextlib.suppress(OSError):
                caller.send(json.dumps({"busy": True}).encode())
            caller.close()
            return
        self._control = caller
        self._send({"manifest": self._manifest}, [])
        names = list(self._held)
        for start in range(0, len(names), HELD_EACH):
            some = names[start : start + HELD_EACH]
            self._send({"held": some}, [self._held[name] for name in some])
        self._send({"end": True}, [])

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._forget(pid)
            self._send({"exited": pid, "status": status}, [])

    def _forget(self, pid: int) -> None:
        """A worker has ended. Its successor may have its place already."""
        index = self._children.pop(pid, -1)
        if index not in self._children.values():
            self._drop([process_name(index)])

    def _send(self, message: dict[str, Any], fds: list[int]) -> None:
        if self._control is None:
            return
        with contextlib.suppress(ConnectionError):  # the supervisor is gone; the next read says so
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)

    def _stop(self) -> None:
        for pid in list(self._children):
            pidfd = os.pidfd_open(pid)
            kill_as_its_user(pidfd)
            os.close(pidfd)
        while self._children:
            self._forget(os.wait()[0])


def kill_as_its_user(pidfd: int) -> None:
    """End another user's process without CAP_KILL: as one who has become that user, for which CAP_SETUID must be
    permitted, if not in effect. Nothing if it has ended."""
    from appliance import privileges

    child = os.fork()
    if child == 0:
        try:
            pid = _field(f"/proc/self/fdinfo/{pidfd}", "Pid:")
            uid = _field(f"/proc/{pid}/status", "Uid:")
            privileges.become(uid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def _field(path: str, name: str) -> int:
    """A number of a file of /proc."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def process_name(index: int) -> str:
    """Under which a worker's pidfd is held."""
    return f"{index}.process"


def _become_worker(spawn: Spawn, fds: list[int]) -> None:
    """In the child: forward packets until told to stop, then leave without any clean-up of the template's state."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _name_process(f"edge-worker-{spawn.index}")
        if spawn.cpu >= 0:
            os.sched_setaffinity(0, {spawn.cpu})
        _close_others({0, 1, 2, *fds})
        _forward(spawn, fds)
        os._exit(0)
    except BaseException as error:  # nothing may escape into the template's loop
        sys.stderr.write(f"worker {spawn.index}: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(1)


def _close_others(kept: set[int]) -> None:
    """Close what belongs to siblings, or to the template: the writable tables among it."""
    first = 0
    for fd in [*sorted(kept), _DESCRIPTOR_MAX]:
        if fd > first:
            os.closerange(first, fd)
        first = fd + 1


def _forward(spawn: Spawn, fds: list[int]) -> None:
    from appliance import privileges
    from appliance.dataplane import flow, memory, misses, sleep, staged, state
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
    timer = sleep.timer()
    epoll = sleep.descriptor(named["tun"], named["wire"], named["handoff"], named["wake"], timer)
    descriptors = state.Descriptors(
        named["tun"],
        named["wire"],
        named["handoff"],
        epoll,
        sources,
        missed=named["missed"],
        fragmenting=named["fragmenting"],
        timer=timer,
    )
    made = state.make(settings, descriptors, tables, records, counts, control, reports, clients)
    privileges.drop(spawn.uid, spawn.gid)
    privileges.confine(privileges.WORKER)
    staged.forward(made.record, control)


def _name_process(name: str) -> None:
    """What ``ps`` and ``top`` show."""
    Path("/proc/self/comm").write_text(name)


def main() -> None:
    """Entry of the process."""
    started = time.monotonic()
    control, listener = (socket.socket(fileno=int(it)) for it in sys.argv[1:3])
    _name_process("edge-template")
    from appliance.supervisor.warm import compile_kernels

    compile_kernels()
    gc.collect()
    gc.freeze()  # the collector must not touch, and so unshare, what the children inherit
    template = Template(control, listener)
    control.send(json.dumps({"ready": round(time.monotonic() - started, 3)}).encode())
    template.run()


if __name__ == "__main__":
    main()
