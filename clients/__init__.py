"""Real SDKs and frameworks as clients of a gateway without a key: `make clients`.

Invariant: a client that could not be installed is never reported as working.
"""
