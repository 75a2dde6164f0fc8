"""Native requests: bodies in a provider's own dialect, passed through to whoever speaks it.

`paths` says what a path means, `asked` what a body asks for, `usage` what an answer cost; `targets`
and `health` choose the upstream, `spine` makes the call. Invariant: nothing is understood that
admission and accounting do not need, so a provider's new feature works on the day it appears.
"""
