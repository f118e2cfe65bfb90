"""The command lines of the end-to-end tests."""

from e2e.conftest import cli

__all__ = ["cli"]
