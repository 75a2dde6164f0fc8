"""The end of what a test's faults have brought about."""

from __future__ import annotations

from tests.gateway import Gateway


async def all_is_well(gateway: Gateway) -> None:
    """End what faults have paused and put out, for all processes."""
    limiter = gateway.services.limiter
    for name, view in (await limiter.snapshot()).limits.items():
        if view.paused_by or view.paused_ms:
            await limiter.resume(name)
    await gateway.services.spine.health["gemini"].open()
