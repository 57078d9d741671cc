"""The flow log's executor: looks at the workers' tables once a second, writes what ``observe.flowlog`` makes of it.

Theory of operation
-------------------
*Owns* the output and the trackers. A task in the supervisor's event loop has each look made in a thread, where numpy
works without the interpreter's lock; nothing else touches trackers, allowance and output while it runs (``_lock``). The
catalogue is read there while the event loop writes it: single look-ups, which the interpreter makes whole.

*Costs* the packet path nothing: it does not know of the log. A look reads one cache line of each flow record; it is
followed by a rest of at least ``REST`` times as long, so that tables of any size take at most a tenth of one CPU.

*Limits*: ``flowlog.rate`` records a second, of those that ``flowlog.sample`` leaves; the others are counted, and a
record says how many there were. Ends come before beginnings, since they say more.

*Failure*: what cannot be written is counted, and lost; the file is opened anew at the next look. A ``reload`` opens it
anew too, which is how logs are rotated, and is refused if that fails.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from appliance import config as configuration
from appliance.observe.flowlog import Allowance, Describer, Seen, Tracker, sampled, spread, when
from appliance.supervisor.errors import StartError
from appliance.tables.layout import IPAddress

if TYPE_CHECKING:
    from appliance.supervisor.workers import Worker
    from appliance.tables.catalogue import Catalogue

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
REST: Final = 9
"""How long to rest after a look, in terms of its own time."""
MODE: Final = 0o640
_STDERR: Final = 2
_INFO: Final = b"<6>"


class Output:
    """Where lines go: a file, or standard error, behind their priority if that is the journal."""

    def __init__(self, path: Path | None, environment: Any = os.environ) -> None:
        self._path = path
        self._prefix = _INFO if path is None and "JOURNAL_STREAM" in environment else b""
        self._fd = -1
        self._is_broken_off = False

    def open(self) -> None:
        """Opens the file, if it is not open. Raises OSError."""
        if self._path is None:
            self._fd = _STDERR
        elif self._fd < 0:  # a pipe that nobody reads is an error, and not waited for
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(self._path, flags, MODE)

    def write(self, lines: Sequence[bytes]) -> None:
        """Writes these lines, as long as the file takes them. Raises OSError; then it is opened anew the next time."""
        self.open()
        try:
            if self._path is None:
                for line in lines:  # one at a time, so that none is mixed with one of the log
                    os.write(self._fd, self._prefix + line)
            else:
                self._append(b"".join(lines))
        except OSError:
            self.close()
            raise

    def _append(self, data: bytes) -> None:
        """A line that was broken off, as the disk was full, is ended before the next one."""
        data = b"\n" * self._is_broken_off + data
        while data:
            written = os.write(self._fd, data)
            self._is_broken_off = data[written - 1 : written] != b"\n"
            data = data[written:]

    def close(self) -> None:
        """Closes the file."""
        if self._path is not None and self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class FlowLog:
    """See the module. ``node``: what this node is called in records."""

    def __init__(
        self, settings: configuration.FlowLog, workers: Sequence[Worker], catalogue: Catalogue, node: str
    ) -> None:
        self.counters: Counter[str] = Counter(written=0, suppressed=0, failed=0, missed=0)
        self.last_error = ""
        self._settings = settings
        self._workers = workers
        self._catalogue = catalogue
        self._node = node
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._output = Output(settings.file or None)
        self._begin()

    def _begin(self) -> None:
        self._trackers = [Tracker() for _ in self._workers]
        self._allowance = Allowance(self._settings.rate, time.monotonic())
        self._describer = Describer(self._node, self._owner, self._service)
        self._suppressed = 0

    def _owner(self, address: IPAddress) -> str:
        host = self._catalogue.hosts.get(address)
        return "" if host is None else host.owner

    def _service(self, address: IPAddress) -> str:
        service = self._catalogue.services.get(address)
        return "" if service is None else service.name

    def start(self) -> None:
        """Looks from now on, if the configuration wants it."""
        if self._settings.enabled:
            self._task = asyncio.create_task(self._run(), name="flow log")

    async def stop(self) -> None:
        """Looks once more, and no more. What goes on is not told of."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            await self._look()
        self._output.close()

    async def reconfigure(self, settings: configuration.FlowLog, output: Output) -> None:
        """Goes on with these settings, and with what ``opened`` gave for them."""
        async with self._lock:
            self._output.close()
            self._output = output
            was_enabled, self._settings = self._settings.enabled, settings
            self._allowance.rate = settings.rate
        if settings.enabled and not was_enabled:
            self._begin()
            self.start()
        elif was_enabled and not settings.enabled:
            await self.stop()

    def status(self) -> dict[str, Any]:
        """What ``status`` shows."""
        return {"enabled": self._settings.enabled, **self.counters, "last_error": self.last_error}

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await self._look()
            except Exception as error:
                log.exception("the flow log missed a look")
                self.last_error = str(error)
            await asyncio.sleep(max(LOOK_S, REST * (time.monotonic() - began)))

    async def _look(self) -> None:
        """Not to be cancelled in the middle: the thread would go on beside the next one."""
        async with self._lock:
            looking = asyncio.ensure_future(asyncio.to_thread(self._look_once))
            try:
                await asyncio.shield(looking)
            except asyncio.CancelledError:
                await asyncio.wait({looking})
                raise

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _look_once(self) -> None:
        now, wall = time.monotonic_ns(), time.time()
        seen = [
            (worker.index, tracker.look(worker.records, worker.counters, now))
            for worker, tracker in zip(self._workers, self._trackers, strict=True)
        ]
        self.counters["missed"] += sum(it.missed for _, it in seen)
        self._write([orjson.dumps(it, option=orjson.OPT_APPEND_NEWLINE) for it in self._records(seen, now, wall)])

    def _records(self, seen: Sequence[tuple[int, Seen]], now: int, wall: float) -> Iterator[dict[str, Any]]:
        one_in = self._settings.sample
        ended = [(i, it, n) for i, it in seen for n in sampled(it.ended, one_in).nonzero()[0]]
        began = [(i, it, n) for i, it in seen for n in sampled(it.began, one_in).nonzero()[0]]
        left_out = 0
        for flows, told in ((ended, self._end), (began, self._beginning)):
            allowed = self._allowance.take(len(flows), now / 1e9)
            left_out += len(flows) - allowed
            for number in spread(len(flows), allowed):
                worker, it, n = flows[number]
                yield told(worker, it, n, now, wall)
        self.counters["suppressed"] += left_out
        if left_out:
            yield {"time": when(wall), "event": "suppressed", "node": self._node, "records": left_out}

    def _end(self, worker: int, seen: Seen, number: int, now: int, wall: float) -> dict[str, Any]:
        return self._describer.ended(worker, seen, number, wall, now)

    def _beginning(self, worker: int, seen: Seen, number: int, _now: int, wall: float) -> dict[str, Any]:
        return self._describer.began(worker, seen.began[number], wall)

    def _write(self, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        try:
            self._output.write(lines)
        except OSError as error:
            self.counters["failed"] += len(lines)
            if self.last_error != str(error):
                log.error("the flow log cannot be written", extra={"error": str(error)})
            self.last_error = str(error)
        else:
            self.counters["written"] += len(lines)
            self.last_error = ""


def opened(settings: configuration.FlowLog) -> Output:
    """The output of these settings, which the caller closes. Raises StartError if they want one that there is not."""
    output = Output(settings.file or None)
    if settings.enabled:
        try:
            output.open()
        except OSError as error:
            wanted = f"a file that can be written, got {settings.file}: {error.strerror}"
            raise StartError(f"flowlog.file: expected {wanted}") from error
    return output
