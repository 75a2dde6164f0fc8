"""Tidegate: a self-hosted LLM gateway with one fair admission for all processes."""

__version__ = "0.1.0"
