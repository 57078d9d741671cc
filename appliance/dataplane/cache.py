"""Where numba keeps compiled code: a directory a version of the sources.

numba notices a change of the file that a cached function stands in, but not of the modules that it calls, nor of the
globals that it froze. The directory's name is therefore a digest of every source that can end up in compiled code. In
it, functions lie by their module (``locator``), not by the path of the installation: an upgrade that leaves the packet
path as it was compiles nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_LOCATORS = "appliance.dataplane.locator.ByModule,UserProvidedCacheLocator"
_SOURCES = ("dataplane", "tables", "observe/counters.py", "limits.py")


def fingerprint() -> str:
    """Digest of the compiled modules' sources, of the compiler's version, and of whether it checks bounds."""
    checked = os.environ.get("NUMBA_BOUNDSCHECK", "0")
    digest = hashlib.sha256(f"{sys.version} {version('numba')} {version('llvmlite')} {checked}".encode())
    for source in _SOURCES:
        path = _PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def prune(base: Path, keep: int = 3) -> None:
    """Remove the code of older sources, but for the newest few: a rollback should not have to compile."""
    directories = sorted(base.glob("numba-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for directory in directories[keep:]:
        shutil.rmtree(directory, ignore_errors=True)


def use(base: Path) -> Path:
    """Make numba keep its code under ``base``; before numba is imported. Gives the directory.

    If it cannot be created (read-only root), numba falls back to no directory of ours: the code is compiled at each
    start.
    """
    directory = base / f"numba-{fingerprint()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return directory
    os.environ["NUMBA_CACHE_DIR"], os.environ["NUMBA_CACHE_LOCATOR_CLASSES"] = str(directory), _LOCATORS
    if "numba" in sys.modules:
        from numba import config

        config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = str(directory), _LOCATORS
    return directory
