"""The files of a lab: one directory, which begins with it and ends with it.

    /run/edge-lab/NAME/
        lab.json              the spec
        cluster/              appliance.log appliance.pid run/ state/
        node1/                appliance.toml api.sock appliance.log appliance.pid run/ state/
        web0/                 http.log http.pid iperf3-5201.log iperf3-5201.pid …

Everything that a lab consists of follows from lab.json, which is written before anything else is created, and
from the records (`*.pid`, see `processes`). Whoever changes a lab holds `locked`; readers need no lock, as
files are replaced, never rewritten.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appliance.lab.plan import Setting, Spec, Topology, topology

ROOT = Path("/run/edge-lab")


class NoLabError(Exception):
    """There is no lab of that name; `str()` says how to get one."""


@dataclass(frozen=True)
class Files:
    """Where a lab's files are."""

    lab: str
    root: Path = ROOT

    @property
    def directory(self) -> Path:
        """The lab's own directory."""
        return self.root / self.lab

    def of(self, member: str) -> Path:
        """The directory of a node or a container."""
        return self.directory / member

    def socket(self, node: str) -> Path:
        """The local API of a node."""
        return self.of(node) / "api.sock"

    def config(self, node: str) -> Path:
        """The configuration of a node."""
        return self.of(node) / "appliance.toml"

    def log(self, host: str) -> Path:
        """What a node's supervisor and workers, or the cluster's manager, write to standard error."""
        return self.of(host) / "appliance.log"

    def record(self, host: str) -> Path:
        """The record of a node's supervisor, or of the cluster's manager."""
        return self.of(host) / "appliance.pid"

    def records(self) -> list[Path]:
        """The records of all processes that the lab started."""
        return sorted(self.directory.glob("*/*.pid"))

    def save(self, spec: Spec) -> None:
        """Writes lab.json, and makes a directory for each member that has none."""
        self.directory.mkdir(parents=True, exist_ok=True)
        replace(self.directory / "lab.json", json.dumps(asdict(spec), indent=1))
        for member in topology(spec).members:
            self.of(member.name).mkdir(exist_ok=True)

    def load(self) -> Topology:
        """The lab that lab.json describes. Raises NoLabError."""
        try:
            return topology(_spec(json.loads((self.directory / "lab.json").read_text())))
        except FileNotFoundError:
            raise NoLabError(f"no lab {self.lab!r}: start it with `appliance lab up`") from None

    def clear(self) -> None:
        """Deletes everything in the lab's directory; the directory itself ends with `locked`."""
        for path in self.directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps others from changing this lab. Leaves no file: the lock is on the directory itself."""
        handle = self._lock()
        try:
            yield
        finally:
            with suppress(OSError):  # rmdir deletes only what is empty: a lab that is up stays
                self.directory.rmdir()
                self.root.rmdir()
            os.close(handle)

    def _lock(self) -> int:
        """A descriptor that holds the lock on the directory that has the name now."""
        while True:
            with suppress(FileNotFoundError):  # deleted by another one between two of these steps
                self.directory.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(handle, fcntl.LOCK_EX)
                if self._has_name(handle):
                    return handle
                os.close(handle)

    def _has_name(self, handle: int) -> bool:
        """Whether a directory still has the lab's name: the last holder of its lock may have deleted it."""
        try:
            return os.path.samestat(os.fstat(handle), self.directory.stat())
        except FileNotFoundError:
            return False


def _spec(data: dict[str, Any]) -> Spec:
    settings = tuple(Setting(**it) for it in data["settings"])
    return Spec(**{**data, "workers": tuple(data["workers"]), "settings": settings})


def replace(path: Path, text: str) -> None:
    """Writes a file so that readers see the old one or the new one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)
