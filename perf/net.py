"""Namespaces of the containers of `direct` and `vxlan`, beside the lab that holds the nodes.

Theory of operation
-------------------
A measurement works inside one lab, called `LAB` (`appliance.lab`): its underlay, its nodes and the
appliance's own containers. Containers of the other systems are namespaces called `PREFIX` + something that
the lab does not own. One process at a time holds `LOCK`; so whoever holds it knows that everything of these
names is a leftover of a run that was killed. `workspace` removes that before, and its own after, processes
included. Links and routes vanish with their namespaces, so there is nothing else to undo.

Links and routes are written as `ip -batch` lines, so that a topology reads as what an engineer would type.
"""

import fcntl
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import netns

from appliance.lab import lifecycle, network, processes
from appliance.lab.plan import owned
from appliance.lab.processes import Process, inside

LAB = "eaperf"
PREFIX = LAB + "-"
"""Of the name of every namespace that a measurement uses."""
LOCK = Path("/run/edge-appliance-perf.lock")
COMMAND_TIMEOUT = 30.0
"""Seconds for one configuration command."""


class NetError(RuntimeError):
    """A command that failed, with what it said."""


def run(*argv: str, stdin: str = "") -> str:
    """Runs a command to its end; what it printed. Raises NetError."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=COMMAND_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetError(f"{' '.join(argv)}: {error}") from error
    if done.returncode:
        raise NetError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def ip(namespace: str, script: str) -> None:
    """Carries out the lines of an `ip -batch` script in a namespace. Raises NetError."""
    run("ip", "-n", namespace, "-batch", "-", stdin=script)


def sysctl(namespace: str, *assignments: str) -> None:
    """Sets kernel parameters of a namespace, each `key=value`. Raises NetError."""
    run(*inside(namespace, ["sysctl", "-q", "-w", *assignments]))


def add_namespace(name: str) -> None:
    """A namespace with its loopback up."""
    netns.create(name)
    ip(name, "link set lo up")


@contextmanager
def workspace() -> Iterator[None]:
    """Exclusive use of the lab `LAB` and of the names that begin with `PREFIX`; nothing of them before and
    after.

    Raises NetError if another process has them.
    """
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NetError(f"{LOCK}: expected no other measurement at work") from None
        sweep()
        try:
            yield
        finally:
            with _uninterrupted():
                sweep()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C does not cut the clearing up short."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def sweep() -> None:
    """Ends what a measurement has started and removes what it has made. Raises NetError, LabError."""
    names = [name for name in netns.listnetns() if name.startswith(PREFIX)]
    processes.stop(process for name in names if not owned(LAB, name) for process in _dwellers(name))
    lifecycle.down(LAB)
    network.remove(name for name in names if not owned(LAB, name))


def _dwellers(namespace: str) -> Iterator[Process]:
    """What runs in a namespace."""
    for pid in netns.ns_pids().get(namespace, []):
        if process := processes.running(pid):
            yield process
