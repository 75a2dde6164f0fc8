"""Emulator of provider APIs, for tests, benchmarks and a first try without a key."""
