"""Prices of models by day and tier, and the cost of a usage. Reads no files but its own data."""
