"""Dashboard: the live page for operators."""
