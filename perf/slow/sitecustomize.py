"""Makes the packet path slow, from outside: Python imports this module at its start if its directory is in PYTHONPATH.

The packet path calls the kernel through a table of addresses (`appliance.dataplane.libc.table`). When that module has
been imported, its `table` is replaced by one whose read and recvmmsg waste time for each packet that they got. The
compiled packet path is the production's own, untouched."""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TARGET = "appliance.dataplane.libc"


class Patching(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds TARGET as everybody does, and patches it after it has run."""

    def __init__(self) -> None:
        self._loader: Any = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The usual one with this loader."""
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The usual one."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """The module's own code, then ours."""
        self._loader.exec_module(module)
        patch(module, os.environ["PERF_SLOW"])


def patch(libc: Any, kind: str) -> None:
    """Replaces two calls of the table."""
    import waste

    original = libc.table

    def table() -> Any:
        calls = original()
        calls[libc.READ], calls[libc.RECVMMSG] = waste.calls(kind)
        return calls

    libc.table = table


if os.environ.get("PERF_SLOW"):
    sys.meta_path.insert(0, Patching())
