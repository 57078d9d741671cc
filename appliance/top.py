"""`appliance top`: the difference of two looks at a node's status, again and again."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count as numbers
from typing import Any

import click
from rich.live import Live

from appliance import screens
from appliance.client import Client
from appliance.observe.rates import rates


def watch(api: Client, interval: float, count: int | None, as_json: bool) -> None:
    """Prints rates each `interval` seconds, `count` times or until interrupted. Raises ApiError."""
    with suppress(KeyboardInterrupt):
        if as_json or not sys.stdout.isatty():
            for data in _looks(api, interval, count):
                if as_json:
                    click.echo(json.dumps(data))
                else:
                    screens.show(screens.top(data))
            return
        with Live(auto_refresh=False, screen=count is None) as live:
            for data in _looks(api, interval, count):
                live.update(screens.top(data), refresh=True)


def _looks(api: Client, interval: float, count: int | None) -> Iterator[dict[str, Any]]:
    before, then = api.status(), time.monotonic()
    for _ in numbers() if count is None else range(count):
        time.sleep(max(0.0, then + interval - time.monotonic()))
        after, now = api.status(), time.monotonic()
        yield rates(before, after, now - then)
        before, then = after, now
