"""The policy of a pool as the product has it: read from a file, on record, changed while it runs.

`scopes` says what the id of a limit means, `plain` and `file` read and write policies, `revisions`
decides which one is in force, `keeper` sees to it.
"""

from tidegate.policy.file import deployed, deployed_upstreams, emulates
from tidegate.policy.keeper import PolicyKeeper, policy_to_start_with

__all__ = ["PolicyKeeper", "deployed", "deployed_upstreams", "emulates", "policy_to_start_with"]
