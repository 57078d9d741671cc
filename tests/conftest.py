"""What every test shares: its group, the `root` marker, and a summary that says what was not tested and why."""

import os
import shutil
import subprocess
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from appliance.config import Config
from appliance.dataplane import cache as compiled

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


ROOT = Path(__file__).parent.parent

COMPUTING = (
    "tests/packets/",
    "tests/oracle/",
    "tests/observe/test_trace.py",
    *(f"tests/dataplane/test_{name}.py" for name in ("balance", "bounds", "order", "probe", "worker")),
)
"""Tests that need nothing of the machine but a processor, and give way where they run beside others."""
BESIDE = (
    *COMPUTING,
    *(f"tests/{name}/" for name in ("cluster", "manager", "naming")),
    *(f"tests/supervisor/test_{name}.py" for name in ("killed", "membership", "nodeengine")),
)
"""Tests that have brokers and namespaces of their own. With ``pytest -n 2 --dist loadscope`` they run one after another
beside all others, which run one after another too."""


class Groups(LoadScopeScheduling):
    """The two groups, a process each."""

    def _split_scope(self, nodeid: str) -> str:
        return "beside" if nodeid.startswith(BESIDE) else "others"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups | None:
    """Groups instead of modules."""
    return Groups(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_configure(config: pytest.Config) -> None:
    """A process of pytest-xdist is a session of its own: the kernel weighs priorities by session (sched(7))."""
    if hasattr(config, "workerinput"):
        os.setsid()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Beside other tests, one that only computes gives way."""
    if hasattr(item.config, "workerinput"):
        niceness = 10 if item.nodeid.startswith(COMPUTING) else 0
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
        with suppress(OSError):  # a kernel without autogroups has no such file
            Path("/proc/self/autogroup").write_text(str(niceness))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `root` where it cannot run."""
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
