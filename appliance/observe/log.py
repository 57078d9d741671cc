"""Logs on stderr: one line an event, ``LEVEL logger: event key=value …``, as journald likes them.

Under systemd (``JOURNAL_STREAM`` is set) a line begins with its priority, ``<4>`` and the like (sd-daemon(3)), so that
``journalctl -p warning`` works.

No event can flood: of one event, by its logger and words without their fields, ``BURST`` lines pass in ``PERIOD_S``
seconds; the first line after that tells how many were left out (``suppressed=``). At most ``EVENTS_MAX`` events are
told apart, which is far more than the sources have. Errors with a traceback are limited alike.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


BURST: Final = 100
PERIOD_S: Final = 10.0
EVENTS_MAX: Final = 1_000
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG: Final = 7


@dataclass
class _Seen:
    """One event in the period that began at ``since``."""

    since: float
    lines: int = 0
    suppressed: int = 0


class Limiter(logging.Filter):
    """Lets a burst of each event pass. ``now``: seconds that never go back."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._seen: dict[tuple[str, str], _Seen] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record passes; one that ends a silence gets the field ``suppressed``."""
        now, key = self._now(), (record.name, str(record.msg))
        seen = self._seen.get(key)
        if seen is None or now - seen.since >= PERIOD_S:
            if seen is not None and seen.suppressed:
                record.suppressed = seen.suppressed
            if len(self._seen) >= EVENTS_MAX:
                self._seen.clear()
            seen = self._seen[key] = _Seen(now)
        seen.lines += 1
        if seen.lines <= BURST:
            return True
        seen.suppressed += 1
        return False


class KeyValueFormatter(logging.Formatter):
    """The event, then its fields in the order in which they were given. ``journal``: behind its priority."""

    def __init__(self, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on its own lines if there is one."""
        fields = " ".join(f"{k}={_shown(v)}" for k, v in record.__dict__.items() if k not in _STANDARD)
        event = " ".join(record.getMessage().splitlines())
        line = f"{self._priority(record.levelno)}{record.levelname.lower()} {record.name}: {event} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


    def _priority(self, level: int) -> str:
        if not self._journal:
            return ""
        return f"<{next((number for least, number in _PRIORITIES if level >= least), _DEBUG)}>"


def _shown(value: object) -> str:
    text = str(value)
    return repr(text) if not text or any(c.isspace() or c in "\"'=" for c in text) else text


def configure(level: str, environment: Mapping[str, str] = os.environ) -> None:
    """Log events of this level and above to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter("JOURNAL_STREAM" in environment))
    handler.addFilter(Limiter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("numba", "asyncio", "pyroute2", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
