"""Where in its cache numba looks for a function of ours: by the module's place in the package.

numba's own way is by the absolute path of the source file. Versions that are installed side by side would then each
compile what is the same in all of them. The directory above is a digest of all sources (``cache``), so two files at
one place of the package are equal.
"""

from __future__ import annotations

from pathlib import Path

from numba.core.caching import UserProvidedCacheLocator

_PACKAGE = Path(__file__).resolve().parent.parent


class ByModule(UserProvidedCacheLocator):  # type: ignore[misc]  # numba has no types
    """Takes the functions of this package, and leaves others to numba's own locators."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        """The directory of a source file, below the cache's."""
        return ".".join(Path(py_file).resolve().parent.relative_to(_PACKAGE.parent).parts)

    @classmethod
    def from_function(cls, py_func: object, py_file: str) -> ByModule | None:
        """A locator for a function, or None if it is not ours or the cache cannot be written."""
        if not Path(py_file).resolve().is_relative_to(_PACKAGE):
            return None
        found: ByModule | None = super().from_function(py_func, py_file)
        return found
