"""What a call will need of the limiter: its limits, its LLM tokens, its place in line.

Pure: no I/O library. `pieces` counts what a call consists of, `track` and `estimator` learn how
far such counts are off, `reach` says which limits of a policy a call falls under, `demands` puts it
together, `pause` says what a 429 means for everybody else.
"""

from tidegate.demand.demands import Demand, Demands
from tidegate.demand.estimator import Estimate, Estimator, Learned, tokens_of
from tidegate.demand.pause import Pause, pause_after

__all__ = [
    "Demand",
    "Demands",
    "Estimate",
    "Estimator",
    "Learned",
    "Pause",
    "pause_after",
    "tokens_of",
]
