"""Our gateway's relay beside its peers': one load generator, one upstream, one run.

Both are C (`load.c`, `upstream.c`), compiled at the first run, and cost less than anything that is
measured between them.
"""
