"""What a refusal comes to, in the words of all dialects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

# throttled: too much for now. unpaid: the account has no money left. key: the key is dead.
# busy: a server of one's own has no room at the moment, which is no fault. never: the same request
# would be refused again. of_thing: about something that the request names.
What = Literal["throttled", "unpaid", "key", "busy", "never", "of_thing"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """unit: what there was too much of. wait_ms: until when, beside what every dialect says of it.
    per_day: whether it was too much for a day. day_quota: for the day until midnight. of_account:
    whether it binds more than the model that was asked for.
    """

    what: What
    unit: str | None = None
    wait_ms: int | None = None
    per_day: bool = False
    day_quota: bool = False
    of_account: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """A provider's refusal as it came: the error object of the body, headers in lower case."""

    status: int
    error: Mapping[str, Any]
    headers: Mapping[str, str]
    now: datetime

    @property
    def message(self) -> str:
        """Its text, cut to what is worth searching."""
        return str(self.error.get("message", ""))[:4_000]

    @property
    def words(self) -> frozenset[str]:
        """Its type and code."""
        return frozenset(str(self.error.get(name)) for name in ("type", "code"))

    @property
    def details(self) -> list[dict[str, Any]]:
        """Google's list; empty where the details are something else."""
        found = self.error.get("details")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
