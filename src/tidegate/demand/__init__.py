"""What a call will need of the limiter: its limits, its LLM tokens, its place in line.

Pure: no I/O library. `pieces` counts what a call consists of, `track` and `estimator` learn how far
such counts are off, `reach` says which limits of a policy a call falls under.
"""

from tidegate.demand.estimator import Estimate, Estimator, Learned, tokens_of

__all__ = ["Estimate", "Estimator", "Learned", "tokens_of"]
