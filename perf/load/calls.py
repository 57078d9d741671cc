"""Calls of the lab's demo service by every kind of client, for as long as somebody wants: what was called, what failed.

Each kind is a thread of its own, which calls, notes a failure with its time, and pauses. A call is

    connection   an HTTP request over a connection of its own
    datagram     a datagram from a socket of its own
    unstopped    a datagram from one socket that is never closed
    kept         an HTTP request over one connection that is never closed, to one instance
    download     DOWNLOAD bytes over a connection of their own, compared with their digest

Nothing is tried again: what TCP does not mend by itself counts.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from appliance.lab import probe
from appliance.lab.plan import WEB_PORT
from appliance.lab.service import DATAGRAM_MAX, digest

DOWNLOAD: Final = 4_000_000
LATE_S: Final = 1.0
"""After which an answer to a datagram counts as lost."""
BROKEN_S: Final = 10.0
"""After which a connection without a byte counts as broken."""
PAUSES_S: Final = {"connection": 0.1, "datagram": 0.1, "unstopped": 0.02, "kept": 0.05, "download": 0.7}
"""Between two calls of a kind: a load that two CPUs carry beside the churn, and others."""


@dataclass(frozen=True)
class Failure:
    """A call that failed; CLOCK_MONOTONIC seconds."""

    kind: str
    began: float
    ended: float
    why: str


@dataclass
class Called:
    """What became of the calls, by kind."""

    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PAUSES_S, 0))
    failures: list[Failure] = field(default_factory=list)


class Kept:
    """One connection to an instance; one that broke is made anew at the next call."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, WEB_PORT, timeout=BROKEN_S)

    def call(self) -> None:
        """One request. Raises OSError, HTTPException."""
        try:
            self._connection.request("GET", "/")
            self._connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise


class Unstopped:
    """One socket for all datagrams."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
        self._target = (address, WEB_PORT)
        self._talker = socket.socket(family, socket.SOCK_DGRAM)

    def call(self) -> None:
        """One datagram and its answer. Raises OSError."""
        self._talker.setblocking(False)
        with suppress(BlockingIOError):  # answers that came too late
            while self._talker.recv(DATAGRAM_MAX):
                pass
        self._talker.settimeout(LATE_S)
        self._talker.sendto(b"who are you?", self._target)
        self._talker.recv(DATAGRAM_MAX)


class Download:
    """Files of a known digest."""

    def __init__(self, address: str) -> None:
        self._address, self._digest = address, digest(DOWNLOAD)

    def call(self) -> None:
        """One file. Raises OSError, HTTPException, ValueError for other bytes than those of the file."""
        connection, state = http.client.HTTPConnection(self._address, WEB_PORT, timeout=BROKEN_S), hashlib.sha256()
        try:
            connection.request("GET", f"/stream/{DOWNLOAD}", headers={"Connection": "close"})
            response = connection.getresponse()
            while block := response.read(1 << 16):
                state.update(block)
        finally:
            connection.close()
        if state.digest() != self._digest:
            raise ValueError("other bytes than were sent")


def callers(service: str, instance: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each kind of call, to a ServiceIP, and the kept one to an instance IP."""
    probe.TIMEOUT_S = BROKEN_S
    yield "connection", lambda: probe.call(service, WEB_PORT)
    yield "datagram", lambda: Unstopped(service).call()
    yield "unstopped", Unstopped(service).call
    yield "kept", Kept(instance).call
    yield "download", Download(service).call


def call_until(stop: threading.Event, service: str, instance: str) -> Called:
    """Calls until told to stop."""
    seen = Called()
    threads = [
        threading.Thread(target=_repeat, args=(stop, kind, call, seen), daemon=True)
        for kind, call in callers(service, instance)
    ]
    for thread in threads:
        thread.start()
    stop.wait()
    for thread in threads:
        thread.join(BROKEN_S + LATE_S)
    return seen


def _repeat(stop: threading.Event, kind: str, call: Callable[[], object], seen: Called) -> None:
    while not stop.wait(PAUSES_S[kind]):
        began = time.monotonic()
        try:
            call()
        except (OSError, http.client.HTTPException, json.JSONDecodeError, ValueError) as error:
            seen.failures.append(Failure(kind, began, time.monotonic(), str(error) or type(error).__name__))
        seen.calls[kind] += 1
