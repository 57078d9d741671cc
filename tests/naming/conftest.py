"""Namespaces that a test makes are removed after it."""

from tests.environment.conftest import make_netns

__all__ = ["make_netns"]
