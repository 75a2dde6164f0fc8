"""The limiters that are measured side by side: ours, the peers and the floors.

One adapter a limiter, of a few lines, which the same worker program loads in the limiter's own
environment. An adapter has `opened(orders)`: a context manager, asynchronous unless the catalogue
says that the limiter blocks threads, that gives `acquire(task)`, which returns a context manager
that holds one permit. A worker imports nothing but the standard library and its one adapter.
"""
