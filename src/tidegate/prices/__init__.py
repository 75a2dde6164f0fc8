"""Prices: what models cost, by day and tier, and the cost of a usage. No I/O but its own data."""
