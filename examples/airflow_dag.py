"""Airflow: mapped tasks of any worker share a limit, with a low priority beside live services.

An Airflow pool counts slots of one Airflow; this limit is shared with programs that are not its.
"""

import os
from datetime import datetime

from airflow.sdk import dag, task

from tidegate.limiter import SyncLimiter

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")


@dag(schedule="@daily", start_date=datetime(2026, 1, 1), catchup=False)
def summaries():
    @task
    def documents() -> list[str]:
        return [f"document {number}" for number in range(100)]

    @task(retries=3)
    def summarise(document: str) -> str:
        # A task is a process of its own: the limiter lives as long as it does.
        with (
            SyncLimiter.from_url(REDIS_URL, pool="example-airflow", policy={"llm": 20}) as limiter,
            limiter.acquire("llm", tenant="airflow", priority="low", timeout=3600),
        ):
            return f"Summary of {document}"  # one call to the provider

    summarise.expand(document=documents())


summaries()
