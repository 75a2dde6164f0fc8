"""Supervisor: processes, started, watched and stopped."""
