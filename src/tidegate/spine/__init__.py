"""Spine: the one path of every call to a provider.

`run` admits, makes, settles and records a call; `routing` selects its upstreams and knows which of
them are out or paused for all processes; `native` and `prompt` are the exchanges with an upstream.
"""
