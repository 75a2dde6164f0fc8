"""Limits against a provider that counts as the real one does: the load, the stage and the figures.

The load's mix and the rules of `tidegate.emulator.account` are written before what is measured
against them; change them only with a reason that is not a bar.
"""
