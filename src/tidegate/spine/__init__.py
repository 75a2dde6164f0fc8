"""Spine: the way of every call to a provider.

`faults` counts what goes wrong here, `routing` knows what is out or paused in all processes
together, `patience` ends a wait that a pause makes pointless.
"""
