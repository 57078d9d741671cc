"""Logs on stderr: one line an event, ``LEVEL logger: event key=value …``, as journald likes them."""

from __future__ import annotations

import logging
import sys

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class KeyValueFormatter(logging.Formatter):
    """The event, then its fields in the order in which they were given."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on its own lines if there is one."""
        fields = " ".join(f"{k}={_shown(v)}" for k, v in record.__dict__.items() if k not in _STANDARD)
        line = f"{record.levelname.lower()} {record.name}: {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _shown(value: object) -> str:
    text = str(value)
    return repr(text) if not text or any(c.isspace() or c in "\"'=" for c in text) else text


def configure(level: str) -> None:
    """Log events of this level and above to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("numba", "asyncio", "pyroute2", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
