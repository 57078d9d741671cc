"""Calls each address on port 8080 until every name has answered there: SECONDS NAME,NAME,… ADDRESS…

Prints the count of answers by name for each address. Exit status 1, with what is missing, after SECONDS.
"""

import socket
import sys
import time
from collections import Counter

PAUSE_S = 0.05


def call(address: str) -> str:
    """Who answered, or why nobody did."""
    try:
        with socket.create_connection((address, 8080), timeout=2) as connection:
            return connection.makefile().read()
    except OSError as error:
        return str(error)


deadline = time.monotonic() + float(sys.argv[1])
names = set(sys.argv[2].split(","))
for target in sys.argv[3:]:
    heard: Counter[str] = Counter()
    while not names <= heard.keys():
        if time.monotonic() > deadline:
            sys.exit(f"{target}: expected answers of {sorted(names)}, got {dict(heard)}")
        heard[call(target)] += 1
        time.sleep(PAUSE_S)
    print(target, dict(heard))
