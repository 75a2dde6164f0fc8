"""Telemetry of a process: log events, trace context, finished calls."""
