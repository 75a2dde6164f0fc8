"""Private names of prometheus-client that the metrics use.

prometheus-client >= 0.22, < 0.27. Guarded by `tests/contract/test_private_names.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Histogram


def add_counts(histogram: Histogram, counts: Sequence[int], total: float) -> None:
    """Add many values: the counts of the buckets, the last one unbounded, and the sum.

    The library adds one value at a time, which costs ten times as much.
    """
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)
    histogram._sum.inc(total)
