"""The SDKs' own tests of an API's operations, through a gateway: `make suites`.

Invariant: a test counts only if it passes on the mock directly, and as passed only if it passed
through the gateway in the same run.
"""
