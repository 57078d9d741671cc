"""What every test shares: the `root` marker, and a summary that says what was not tested and why."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from appliance.config import Config
from appliance.dataplane import cache as compiled

ROOT = Path(__file__).parent.parent

BOUNDS: pytest.StashKey["BoundsRun"] = pytest.StashKey()

compiled.use(Config().paths.cache)  # before numba is imported: what `make warm` compiled is what the tests run


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the cluster is away in the test that takes it away; and whether there is time for much."""
    parser.addoption("--outage", type=float, default=3.0, help="seconds without a cluster; 60 is what is promised")
    parser.addoption("--long", action="store_true", help="larger files: minutes instead of seconds")


@pytest.fixture
def outage(request: pytest.FixtureRequest) -> float:
    """Seconds without a cluster."""
    return float(request.config.getoption("--outage"))


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether there is time for the long versions of tests."""
    return bool(request.config.getoption("--long"))


@cache
def missing_for_root() -> str | None:
    """Why this machine cannot run tests with network namespaces and TUN devices, or None if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "needs unshare (util-linux) and ip (iproute2)"
    probe = "ip link set lo up && ip tuntap add probe mode tun"
    tried = subprocess.run(["unshare", "--net", "--mount", "sh", "-c", probe], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"needs network namespaces and /dev/net/tun ({tried.stderr.strip()})"
    return None


class BoundsRun:
    """A test run of its own, with bounds checks compiled in, beside everything else and behind it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "compiled or worker"]
        command += ["tests/packets/test_fixtures.py", "tests/dataplane/test_worker.py"]
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `end` closes it
        self._process = subprocess.Popen(
            ["nice", "-n", "19", *command],
            cwd=ROOT,
            env={**os.environ, "NUMBA_BOUNDSCHECK": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )

    def wait(self) -> tuple[int, str]:
        """Its exit status and output, once it has ended."""
        status = self._process.wait(timeout=400)
        self._output.seek(0)
        return status, self._output.read()

    def end(self) -> None:
        """Nothing of it is left."""
        self._process.kill()
        self._process.wait()
        self._output.close()


@pytest.fixture
def bounds_run(request: pytest.FixtureRequest) -> BoundsRun:
    """The run that was begun with the session."""
    return request.config.stash[BOUNDS]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins the run with bounds checks, if its test is among those that will run."""
    if any("bounds_run" in getattr(item, "fixturenames", ()) for item in session.items):
        session.config.stash[BOUNDS] = BoundsRun()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the run with bounds checks, if the session ended before it."""
    run = session.config.stash.get(BOUNDS, None)
    if run is not None:
        run.end()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts what waits for another run last, and skips what is marked `root` where it cannot run."""
    items.sort(key=lambda item: "bounds_run" in getattr(item, "fixturenames", ()))
    for item in items:
        if item.get_closest_marker("root") and (reason := missing_for_root()):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason to skip, with its count; and one if nothing was skipped."""
    skipped = terminalreporter.getreports("skipped")
    terminalreporter.section(f"not tested: {len(skipped)}", yellow=bool(skipped))
    reasons = Counter(str(report.longrepr[2]) for report in skipped if isinstance(report.longrepr, tuple))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5}  {reason.removeprefix('Skipped: ')}")
