"""What outlives a supervisor: who keeps it, how the next one comes by it, and whether that one can go on with it.

Theory of operation
-------------------
*Owns* nothing: descriptors belong to whoever made or took them (pool, publisher). ``Keepers`` tells all who keep them
about each, by name: the worker template (``supervisor.template``), always, and systemd's store, if it started us. Both
keep duplicates, so it does not matter who dies first. A new template is told everything again.

*The next supervisor* asks the template that still listens at ``paths.runtime/holder.sock``; if there is none, it takes
what systemd kept (``found``). Then ``decided`` compares the manifest, which the one before left, with its own, and what
is there with what is needed: pure, and the only place that decides. Its answers:

- ``ADOPT``: it is all as we would have made it. Workers are taken over as they run.
- ``RENEW``: the same memory and descriptors, but workers of other code or settings. They are taken over, and then
  replaced one at a time.
- ``ANEW``: the configuration wants other descriptors or memory. What there was ends, and flows with it.
- ``REFUSE``: memory of a layout that we do not know. Nothing is touched: the workers go on without us.

Names: ``tables``, ``sticky``, ``broker`` (the connection to the cluster, kept open so that the broker does not announce
our death), and ``INDEX.`` followed by ``tun``, ``wire``, ``handoff``, ``fragmenting``, ``wake``, ``missed``,
``source.N``, ``process``, and the worker's memory (``workers.MEMORY``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from appliance import __version__
from appliance.config import Config
from appliance.dataplane import cache, flow, memory, misses
from appliance.dataplane.balance import sticky
from appliance.observe import counters
from appliance.supervisor.errors import StartError
from appliance.supervisor.notify import Systemd
from appliance.supervisor.record import await_end
from appliance.supervisor.template import DESCRIPTORS, HELD_EACH, kill_as_its_user
from appliance.tables import layout

log = logging.getLogger(__name__)

SOCKET: Final = "holder.sock"
MANIFEST: Final = "manifest"
ANSWER_S: Final = 5.0
"""How long a template may take to hand everything over."""
HOW_TO_END: Final = "end them with `appliance cleanup --processes`, and connections with them"
_MESSAGE_MAX, _FDS_MAX = 65_536, 2 * HELD_EACH
_PROCESS: Final = ".process"
_EACH = (
    "records", "counters", "control", "misses", "tun", "wake", "missed", "wire", "handoff", "fragmenting",
)  # fmt: skip

FIXED: Final = (
    "tunnel.port", "tunnel.source_ports", "tunnel.socket_buffer", "network.tun", "network.overlay", "network.services",
    "workers.flows", "offload.tun_tso", "offload.tun_uso", "offload.udp_gro",
    "tables.hosts", "tables.services", "tables.nodes", "tables.backends", "tables.maglev",
)  # fmt: skip
"""Keys that memory and descriptors were made by, besides the number of workers."""
SPAWNED: Final = (
    "tunnel.learn_hosts", "workers.cpus", "workers.pin", "workers.busy_poll", "workers.user",
    "offload.udp_gso", "offload.coalesce",
)  # fmt: skip
"""Keys that a worker is told at its start."""


class Step(Enum):
    """What to do with what there is."""

    ADOPT = "adopt"
    RENEW = "renew"
    ANEW = "anew"
    REFUSE = "refuse"


@dataclass(frozen=True)
class Verdict:
    """What to do, and why, in a sentence."""

    step: Step
    why: str = ""


@dataclass
class Estate:
    """What the supervisor before has left. ``control``: the connection to the template that kept it, if one did."""

    manifest: Mapping[str, Any]
    held: dict[str, int] = field(default_factory=dict)
    control: socket.socket | None = None

    def take(self, name: str) -> int:
        """A descriptor, which is the caller's from now on. Raises KeyError."""
        return self.held.pop(name)

    def worker(self, index: int) -> Callable[[str], int]:
        """``take`` for what is one worker's."""
        return lambda name: self.take(f"{index}.{name}")

    def is_complete(self, workers: int, source_ports: int) -> bool:
        """Whether everything was kept that so many workers need."""
        return needed(workers, source_ports) <= self.held.keys()

    def close(self) -> None:
        """Give up what was not taken."""
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()

    def dissolve(self) -> None:
        """End the workers, whoever forked them, and the template, and give everything up: the TUN device goes with
        it."""
        processes = [fd for name, fd in self.held.items() if name.endswith(_PROCESS)]
        for fd in processes:
            self.kill(fd)
        for fd in processes:
            await_end(fd)
        self.close()
        if self.control is None:
            return
        with suppress(OSError):
            self.control.send(json.dumps({"leave": True}).encode())
            self.control.settimeout(ANSWER_S)
            while self.control.recv(_MESSAGE_MAX):
                pass
        self.control.close()

    def kill(self, pidfd: int) -> None:
        """End a worker: through the template, which may, or without one as far as we may."""
        if self.control is None:
            kill_as_its_user(pidfd)
        else:
            with suppress(OSError):
                socket.send_fds(self.control, [json.dumps({"kill": True}).encode()], [pidfd])


def needed(workers: int, source_ports: int) -> set[str]:
    """The names without which so many workers cannot go on."""
    sources = [f"source.{i}" for i in range(source_ports)]
    return {"tables", "sticky", *(f"{i}.{name}" for i in range(workers) for name in (*_EACH, *sources))}


def storable(workers: int, source_ports: int) -> set[str]:
    """The names of all that may be kept for so many workers."""
    return {MANIFEST, "broker", *(f"{i}{_PROCESS}" for i in range(workers)), *needed(workers, source_ports)}


def manifest(config: Config, workers: int, seed: int) -> dict[str, Any]:
    """What this supervisor's memory and descriptors are."""
    document = config.model_dump(mode="json")
    values = {key: _value(document, key) for key in (*FIXED, *SPAWNED)}
    return {
        "appliance": __version__,
        "code": cache.fingerprint(),
        "layout": layouts(),
        "workers": workers,
        "seed": seed,
        "keys": values,
    }


def _value(document: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return document[section][name]


def layouts() -> str:
    """A digest of everything that says what shared bytes mean."""
    words = [name for name in dir(layout) if name.startswith("H_")]
    described = [
        layout.VERSION, [(name, getattr(layout, name)) for name in words],
        layout.sections(layout.Capacity(1, 1, 1, 1, 1)),
        flow.FLOW.descr, counters.SECTIONS, memory.SECTIONS, misses.SECTIONS, sticky.SECTIONS, DESCRIPTORS,
    ]  # fmt: skip
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def verdict(found: Mapping[str, Any], ours: Mapping[str, Any]) -> Verdict:
    """What to do with what there is."""
    if found.get("layout") != ours["layout"]:
        return Verdict(
            Step.REFUSE,
            f"the workers that run are of version {found.get('appliance')}, whose memory this version "
            f"({ours['appliance']}) cannot read: {HOW_TO_END}",
        )
    keys = found["keys"]
    fixed = [key for key in FIXED if keys.get(key) != ours["keys"][key]]
    if found["workers"] != ours["workers"]:
        fixed.insert(0, "workers.count")
    if fixed:
        return Verdict(Step.ANEW, f"changed: {', '.join(fixed)}")
    told = [key for key in SPAWNED if keys.get(key) != ours["keys"][key]]
    if found["code"] != ours["code"]:
        told.insert(0, "the packet path")
    return Verdict(Step.RENEW, f"changed: {', '.join(told)}") if told else Verdict(Step.ADOPT)


def decided(left: Estate, ours: Mapping[str, Any]) -> Verdict:
    """What to do with what there is, if something of it may be missing. Another layout has other names: it is refused
    before any is looked for."""
    said = verdict(left.manifest, ours)
    going_on = said.step in (Step.ADOPT, Step.RENEW)
    if going_on and not left.is_complete(ours["workers"], ours["keys"]["tunnel.source_ports"]):
        return Verdict(Step.ANEW, "not everything was kept")
    return said


# --- from the one before ------------------------------------------------------------------------------------------


def found(runtime: Path, kept: dict[str, int]) -> Estate | None:
    """What there is: a template's, or else what systemd kept. Raises StartError if another supervisor has it."""
    estate = _of_template(runtime / SOCKET)
    if estate is not None:
        for fd in kept.values():
            os.close(fd)
        return estate
    if MANIFEST not in kept:
        for fd in kept.values():  # of one that died before it was complete
            os.close(fd)
        return None
    fd = kept.pop(MANIFEST)
    said = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return Estate(json.loads(said), kept)


def _of_template(path: Path) -> Estate | None:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.settimeout(ANSWER_S)
    try:
        control.connect(str(path))
        return _received(control)
    except (FileNotFoundError, ConnectionError):
        control.close()
        return None
    except OSError as error:
        control.close()
        raise StartError(f"{path}: expected the worker template to answer within {ANSWER_S:g} s: {error}") from error
    except StartError:
        control.close()
        raise


def _received(control: socket.socket) -> Estate | None:
    estate = Estate({}, control=control)
    while True:
        data, fds, _, _ = socket.recv_fds(control, _MESSAGE_MAX, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        match json.loads(data or b"{}"):
            case {"busy": _}:
                raise StartError("paths.runtime: expected a directory that no other running appliance uses")
            case {"manifest": said}:
                estate.manifest = said or {}
            case {"held": names}:
                estate.held.update(zip(names, fds, strict=True))
            case {"end": _}:
                return estate
            case _:
                estate.close()
                raise ConnectionResetError(path_of(control))


def path_of(control: socket.socket) -> str:
    """Who is spoken with, for an error's text."""
    return str(control.getpeername())


# --- for the one after --------------------------------------------------------------------------------------------


class Keepers:
    """Tells template and systemd what to keep. ``send`` reaches the template of the moment, if there is one."""

    def __init__(self, systemd: Systemd, send: Callable[[dict[str, Any], list[int]], None]) -> None:
        self._systemd = systemd
        self._send = send
        self._held: dict[str, int] = {}
        self._manifest: dict[str, Any] = {}

    def keep(self, named: Mapping[str, int]) -> None:
        """These are to be kept; what had one of the names is not any more."""
        for name, fd in named.items():
            if self._systemd.is_there:
                if name in self._held:
                    self._systemd.remove(name)
                self._systemd.store(name, fd)
        self._held.update(named)
        self._tell(named)

    def drop(self, name: str) -> None:
        """Have this kept no more, whoever said that it was to be."""
        self._held.pop(name, None)
        self._systemd.remove(name)
        self._send({"drop": [name]}, [])

    def describe(self, said: dict[str, Any]) -> None:
        """What it all is. With this it is complete: a supervisor that dies earlier leaves nothing."""
        self._manifest = said
        self._send({"manifest": said}, [])
        if self._systemd.is_there:
            with _file(said) as fd:
                self._systemd.remove(MANIFEST)
                self._systemd.store(MANIFEST, fd)

    def tell_again(self) -> None:
        """The template is another one."""
        self._tell(self._held)
        if self._manifest:
            self._send({"manifest": self._manifest}, [])

    def clear(self) -> None:
        """The appliance ends on purpose: nothing is kept."""
        for name in (MANIFEST, *self._held):
            self._systemd.remove(name)
        self._held.clear()
        self._manifest = {}

    def _tell(self, named: Mapping[str, int]) -> None:
        items = list(named.items())
        for start in range(0, len(items), HELD_EACH):
            some = items[start : start + HELD_EACH]
            self._send({"hold": [name for name, _ in some]}, [fd for _, fd in some])


@contextmanager
def _file(said: Mapping[str, Any]) -> Iterator[int]:
    fd = os.memfd_create("edge-manifest", os.MFD_CLOEXEC)
    try:
        os.write(fd, json.dumps(said).encode())
        yield fd
    finally:
        os.close(fd)


def listener(runtime: Path, *, beside: bool = False) -> socket.socket:
    """Where the next supervisor finds a template; or beside it, where none looks before ``show``. Raises OSError."""
    path = _beside(runtime) if beside else runtime / SOCKET
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(4)
    except OSError:
        listening.close()
        raise
    return listening


def show(runtime: Path) -> None:
    """Have the next supervisor find the template whose listener was beside, not the one before. Raises OSError."""
    _beside(runtime).replace(runtime / SOCKET)


def _beside(runtime: Path) -> Path:
    return (runtime / SOCKET).with_suffix(".new")
