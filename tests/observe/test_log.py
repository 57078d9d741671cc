"""Log lines: one an event, fields that can be read again, and no event that floods."""

import logging
import sys
from collections.abc import Iterator

import pytest

from appliance.observe import log
from appliance.observe.log import BURST, EVENTS_MAX, PERIOD_S, KeyValueFormatter, Limiter


def record(message: str = "event", level: int = logging.WARNING, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "a.b", "levelno": level, "levelname": logging.getLevelName(level)})
    made.msg = message
    made.__dict__.update(fields)
    return made


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_is_the_event_and_its_fields() -> None:
    line = KeyValueFormatter().format(record(worker=1, error="no such\nthing", empty=""))
    assert line == "warning a.b: event worker=1 error='no such\\nthing' empty=''"
    assert KeyValueFormatter().format(record("two\nlines")) == "warning a.b: two lines"


@pytest.mark.parametrize(
    ("level", "priority"), [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3)]
)
def test_journald_gets_the_priority(level: int, priority: int) -> None:
    assert KeyValueFormatter(journal=True).format(record(level=level)).startswith(f"<{priority}>")


def test_a_flood_of_one_event_is_cut_and_counted_and_no_other_suffers() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    assert sum(limiter.filter(record(peer=number)) for number in range(1_000)) == BURST
    assert limiter.filter(record("another"))
    clock.now += PERIOD_S
    after = record()
    assert limiter.filter(after)
    assert KeyValueFormatter().format(after).endswith(f"suppressed={1_000 - BURST}")
    assert not hasattr(record(), "suppressed")


def test_it_remembers_a_bounded_number_of_events() -> None:
    limiter = Limiter(Clock())
    assert all(limiter.filter(record(f"event {number}")) for number in range(3 * EVENTS_MAX))
    assert len(limiter._seen) <= EVENTS_MAX


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    before = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], logger.level = before


def test_configured_for_a_terminal_and_for_journald(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    for environment, beginning in (({}, "error x: "), ({"JOURNAL_STREAM": "1:2"}, "<3>error x: ")):
        log.configure("info", environment)
        logging.getLogger("x").error("it %s", "happened", extra={"n": 1})
        assert capsys.readouterr().err == f"{beginning}it happened n=1\n"
    assert sys.stderr is not None
