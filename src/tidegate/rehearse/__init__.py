"""Rehearsal: a load under a policy, simulated in virtual time."""
