"""The packet fixtures once more, compiled with numba's bounds checks: nothing is read or written out of bounds.

That compiles the packet path anew, which takes longer than all the fixtures. So it is begun with the session, in a
process of its own that gives way to everything else, and waited for at the end (``tests/conftest.py``).
"""

from __future__ import annotations

from tests.conftest import BoundsRun


def test_fixtures_hold_with_bounds_checks(bounds_run: BoundsRun) -> None:
    status, output = bounds_run.wait()
    assert status == 0, output[-4000:]
    assert " passed" in output
