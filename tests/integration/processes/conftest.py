"""Every test here leaves no process behind."""

from tests.integration.embedded.conftest import data_dir, traces

__all__ = ["data_dir", "traces"]
