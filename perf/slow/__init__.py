"""Deliberate slow-downs, to show that the guard (`perf.smoke`) catches one. Nothing of the appliance knows of them."""

import os
from pathlib import Path

KIND = "PERF_SLOW"
"""Environment variable with the kind of slow-down."""
KINDS = {"spin": "5 µs a packet", "scan": "a table of 65,536 entries is scanned for each packet"}


def enable(kind: str) -> None:
    """Slows every worker down that a process started from now on starts: `sitecustomize` is in each one's path."""
    here = str(Path(__file__).parent)
    os.environ[KIND] = kind
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
