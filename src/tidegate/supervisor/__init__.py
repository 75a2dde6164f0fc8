"""Processes: what they stand on, how they are started, watched and stopped.

`ground` makes a whole configuration out of a partial one (bundled servers, emulated provider),
`roles` are the two kinds of process, `family` keeps several of them running, `up` is all together.
"""
