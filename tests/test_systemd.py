"""The unit file, as systemd's own tools see it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from appliance import privileges
from tests.conftest import ROOT

UNIT = ROOT / "config" / "edge-appliance.service"
EXPOSURE_MAX = 3.0

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (systemd)")


@needs_systemd
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/appliance", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, ours) == (0, [])


@needs_systemd
def test_its_exposure_is_low() -> None:
    command = ["systemd-analyze", "security", "--offline=true", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"exposure level for .*: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < EXPOSURE_MAX


def test_it_gives_no_capability_that_is_not_known() -> None:
    given = {name for line in UNIT.read_text().splitlines() for name in re.findall(r"^Cap.*", line)}
    names = {name for line in given for name in re.findall(r"CAP_([A-Z_]+)", line)}
    assert names <= {*privileges.SUPERVISOR, *privileges.CHILDREN}
    assert set(privileges.CHILDREN) <= names


def test_the_documentation_says_what_each_capability_is_needed_for() -> None:
    lines = (ROOT / "docs" / "operations.md").read_text().partition("Why each is needed")[2].partition("\n\nThe")[0]
    rows = [line.split("|")[1:3] for line in lines.splitlines() if line.startswith("| ")][1:]
    explained = {name for names, why in rows for name in names.strip().split(", ") if len(why) > 10}
    assert explained == {*privileges.SUPERVISOR, *privileges.CHILDREN}
