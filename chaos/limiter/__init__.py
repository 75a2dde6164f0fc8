"""Faults against the limiter, with the truth counted at the far end of the calls."""
