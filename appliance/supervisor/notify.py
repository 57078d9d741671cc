"""What systemd is told, and what it keeps for us: sd_notify(3), sd_pid_notify_with_fds(3), sd_listen_fds(3).

Without systemd (no NOTIFY_SOCKET) nothing is said and nothing was kept. A datagram that systemd does not take costs
a log line, never the supervisor.

The store of descriptors lasts as long as the unit is not stopped. FDPOLL=0, as systemd would otherwise give up a UDP
socket at the first ICMP error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

log = logging.getLogger(__name__)

LISTEN_FDS_START: Final = 3
PATIENCE_S: Final = 1.0
"""Seconds that a datagram waits for room in systemd's queue; the event loop waits too."""
BARRIER_S: Final = 5.0


class Systemd:
    """The service manager that started us, if it is one that wants to hear of us."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._watchdog = int(environment.get("WATCHDOG_USEC", "0")) / 1e6
        if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            self._watchdog = 0.0
        self._beat: asyncio.TimerHandle | None = None

    @property
    def is_there(self) -> bool:
        """Whether anybody listens."""
        return bool(self._address)

    def say(self, *lines: str, descriptors: Sequence[int] = ()) -> None:
        """Send one datagram, with descriptors if there are some."""
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(PATIENCE_S)
                sock.connect(address)
                socket.send_fds(sock, ["\n".join(lines).encode()], list(descriptors))
        except OSError as error:
            log.warning("systemd does not listen", extra={"said": lines[0], "error": str(error)})

    def reloading(self) -> None:
        """A reload begins; ``say("READY=1")`` ends it."""
        self.say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def store(self, name: str, descriptor: int) -> None:
        """Have a descriptor kept. One that it has already is not kept twice (the kernel tells it)."""
        self.say("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=[descriptor])

    def remove(self, name: str) -> None:
        """Have it kept no more."""
        self.say("FDSTOREREMOVE=1", f"FDNAME={name}")

    def forget(self, names: Iterable[str]) -> None:
        """Have none of them kept any more, and wait until they are closed (sd_notify_barrier(3)), ``BARRIER_S`` at
        most."""
        if not self._address:
            return
        for name in names:
            self.remove(name)
        ours, theirs = os.pipe()
        self.say("BARRIER=1", descriptors=[theirs])
        os.close(theirs)
        waiting = select.poll()
        waiting.register(ours, 0)  # POLLHUP, when systemd has closed the other end
        if not waiting.poll(BARRIER_S * 1000):
            log.warning("systemd does not say that it keeps nothing any more")
        os.close(ours)

    def start_watchdog(self) -> None:
        """Say from now on, in the running event loop, that it runs: twice as often as systemd wants to hear it."""
        if self._watchdog and self._address:
            self.say("WATCHDOG=1")
            self._beat = asyncio.get_running_loop().call_later(self._watchdog / 2, self.start_watchdog)

    def stop_watchdog(self) -> None:
        """Say it no more."""
        if self._beat is not None:
            self._beat.cancel()


def kept(environment: dict[str, str]) -> dict[str, int]:
    """The descriptors that systemd kept, by name; they are ours from now on, and the variables are gone."""
    names = kept_names(environment)
    for it in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environment.pop(it, None)
    found: dict[str, int] = {}
    for number, name in enumerate(names, LISTEN_FDS_START):
        os.set_inheritable(number, False)
        if name in found:
            os.close(found[name])
        found[name] = number
    return found


def kept_names(environment: Mapping[str, str]) -> list[str]:
    """Of the descriptors that systemd kept for this process, in their order."""
    pid, count = environment.get("LISTEN_PID"), environment.get("LISTEN_FDS", "")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return environment.get("LISTEN_FDNAMES", "").split(":")[: int(count)]
