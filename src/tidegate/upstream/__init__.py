"""Upstreams: connections to providers, and Gemini by its SDK."""
