"""Other versions of the appliance, each installed in a directory of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from appliance.config import Config
from appliance.dataplane.cache import fingerprint
from tests.conftest import ROOT

SUPERVISOR, PACKET_PATH, TABLES = "supervisor/main.py", "dataplane/__init__.py", "tables/layout.py"
"""Files of three kinds: what nobody else reads, what compiled code is made of, what shared memory is laid out by."""


def installed(directory: Path, version: str, file: str, old: str, new: str) -> dict[str, str]:
    """A version in which one place of the code is another; the environment that has Python run it."""
    package = directory / version / "appliance"
    shutil.copytree(ROOT / "appliance", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text(f'__version__ = "{version}"\n')
    text = (package / file).read_text()
    assert old in text, f"{file}: expected {old}"
    (package / file).write_text(text.replace(old, new, 1))
    return {"PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def lent(cache: Path, environment: dict[str, str]) -> None:
    """Gives a version the code that was compiled of ours, as functions that are the same in both are found there."""
    ask = "from appliance.dataplane.cache import fingerprint; print(fingerprint())"
    command = [sys.executable, "-c", ask]
    its = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout
    ours = Path(Config().paths.cache) / f"numba-{fingerprint()}"
    shutil.copytree(ours, cache / f"numba-{its.strip()}", dirs_exist_ok=True)
