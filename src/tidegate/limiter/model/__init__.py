"""The specification of a pool, executable: what the scripts must do, in plain Python.

Pure. The property tests step it beside the real Lua and compare every reply, every push and the
state. Where the Lua counts, the model derives: what is used of a limit *is* the permits under it,
who waits *is* the queues that are parked. Times are ms of the server's clock, handed in.

    spending   what is spent of rates and day quotas
    state      limits, sessions, queues, permits
    places     where queues stand, whose turn it is
    permits    what a process says of its permits
    outlook    when there can be room at the earliest
    pump       letting in
    roster     who is there, and who knows of whom
    joining    entering and leaving, policies, a pool that begins anew
    pool       the scripts
"""

from __future__ import annotations

from tidegate.limiter.model.pool import PoolModel
from tidegate.limiter.model.pump import ACK_WINDOW

__all__ = ["ACK_WINDOW", "PoolModel"]
