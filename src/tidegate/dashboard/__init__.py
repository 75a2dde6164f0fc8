"""Dashboard: the live page of an operator."""
