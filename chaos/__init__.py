"""Faults at full size, against real servers and processes. Run with `make chaos`."""
