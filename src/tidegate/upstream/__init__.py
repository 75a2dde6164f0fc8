"""Upstreams: connections to providers, and prompts of Gemini."""
