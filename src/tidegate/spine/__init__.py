"""What every way to a provider shares: whether an upstream may be asked, and how long to wait.

`faults` counts what goes wrong here, `routing` knows what is out or paused in all processes
together, `patience` ends a wait that a pause makes pointless.
"""
