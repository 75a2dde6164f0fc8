"""The limiter against its peers: the same worker program, the same faults, one Valkey of its own.

Stands on the standard library wherever `worker.py` needs it, since that runs in the peers'
environments.
"""
