"""The packet fixtures once more, compiled with numba's bounds checks: nothing is read or written out of bounds.

That compiles the packet path anew, which takes longer than all the fixtures, in a process of its own: numba reads the
switch when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

TESTS = ["tests/packets/test_fixtures.py", "tests/dataplane/test_worker.py"]


def test_fixtures_hold_with_bounds_checks() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "compiled or worker", *TESTS]
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert " passed" in run.stdout
