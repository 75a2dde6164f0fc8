"""Executable specification of a pool, stepped beside the Lua by the property tests."""
