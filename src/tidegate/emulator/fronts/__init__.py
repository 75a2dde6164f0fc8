"""Fronts of the emulated provider: what it answers at each dialect's paths."""
