"""The real command lines of tests/e2e, for the tests of architectures."""

from e2e.conftest import cli

__all__ = ["cli"]
