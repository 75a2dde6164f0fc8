"""Metrics for Prometheus and OpenTelemetry. See docs/observability.md."""
