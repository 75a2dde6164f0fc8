"""Admission: what a call needs of the limits, estimated before the call and corrected after it."""
