"""Verification of the promises on an installation."""
