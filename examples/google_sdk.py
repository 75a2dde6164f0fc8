"""Google's SDK in threads: at most 5 calls in flight, over all processes that run this."""

import os
from concurrent.futures import ThreadPoolExecutor

import httpx2
from google import genai
from google.genai.types import HttpOptions

from tidegate.integrations.httpx2 import LimitedTransport
from tidegate.limiter import Demand, SyncLimiter

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
GEMINI_URL = os.environ.get("GOOGLE_GEMINI_BASE_URL", "https://generativelanguage.googleapis.com")


def main() -> None:
    with SyncLimiter.from_url(REDIS_URL, pool="example-google", policy={"gemini": 5}) as limiter:
        transport = LimitedTransport(limiter, Demand(("gemini",), deadline_ms=60_000))
        with httpx2.Client(transport=transport, timeout=60) as http:
            options = HttpOptions(base_url=GEMINI_URL, httpx_client=http)
            sdk = genai.Client(api_key=os.environ["GEMINI_API_KEY"], http_options=options)

            def ask(number: int) -> bool:
                answer = sdk.models.generate_content(
                    model="gemini-2.5-flash", contents=f"Say hello {number}"
                )
                return bool(answer.text)

            with ThreadPoolExecutor(8) as threads:
                print(sum(threads.map(ask, range(8))), "answered")


if __name__ == "__main__":
    main()
