"""Calls the demo service over and over until its input ends, then tells who answered and what failed.

caller.py ADDRESS: a call is one HTTP request over a connection of its own, then one datagram. Prints "ready", and at
the end a JSON object: calls, failures ([seconds, protocol, error]; CLOCK_MONOTONIC) and, by container, the seconds
of its first and last answer.
"""

import json
import select
import sys
import time
from typing import Any

from appliance.lab import probe
from appliance.lab.plan import WEB_PORT

PAUSE_S = 0.005
probe.TIMEOUT_S = 1.0  # what takes longer counts as lost


def main() -> None:
    address = sys.argv[1]
    answers: dict[str, list[float]] = {}
    failures: list[Any] = []
    calls = 0
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        for protocol, ask in (("tcp", probe.call), ("udp", probe.call_datagram)):
            calls += 1
            began = time.monotonic()
            try:
                container = ask(address, WEB_PORT)["container"]
            except (OSError, ValueError) as error:
                failures.append([began, protocol, str(error)])
            else:
                now = time.monotonic()
                answers.setdefault(container, [now, now])[1] = now
    print(json.dumps({"calls": calls, "failures": failures, "answers": answers}))


main()
