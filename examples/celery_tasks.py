"""Celery: one limiter in each worker process, made after the fork.

celery --workdir examples -A celery_tasks worker --concurrency 8
"""

import os

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

from tidegate.limiter import DeadlineExceeded, LimiterUnavailable, QueueFull, SyncLimiter

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
app = Celery("examples", broker=REDIS_URL, backend=REDIS_URL)
limiter: SyncLimiter | None = None


@worker_process_init.connect
def open_limiter(**_options: object) -> None:
    """In the child: the thread and the connections of a limiter do not survive a fork."""
    global limiter
    limiter = SyncLimiter.from_url(REDIS_URL, pool="example-celery", policy={"llm": 3})
    limiter.start()


@worker_process_shutdown.connect
def close_limiter(**_options: object) -> None:
    if limiter is not None:
        limiter.close()


@app.task(bind=True, max_retries=None, acks_late=True)
def ask(self, prompt: str) -> str:
    assert limiter is not None
    try:
        with limiter.acquire("llm", timeout=30):
            return f"You said: {prompt}"  # one call to the provider
    except (DeadlineExceeded, LimiterUnavailable, QueueFull) as refused:
        # No call was made: leave the process to other tasks meanwhile.
        raise self.retry(countdown=(refused.retry_after_ms or 1000) / 1000) from refused
