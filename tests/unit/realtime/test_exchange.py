"""Close codes of realtime sessions: which errors a client may answer by connecting again."""

from __future__ import annotations

import pytest

from tidegate.errors import (
    Forbidden,
    InvalidRequest,
    IssuerUnavailable,
    LeaseLost,
    LimiterUnavailable,
    QuotaExceeded,
    StoreUnavailable,
    TidegateError,
    UpstreamUnavailable,
)
from tidegate.realtime.exchange import code_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("model", "none"), 1007),
        (Forbidden("revoked"), 1008),
        (QuotaExceeded("spent", limit="day", retry_after_ms=1, allowed=""), 1008),
        (UpstreamUnavailable("refused"), 1011),
        (TidegateError("an internal error"), 1011),
        (LimiterUnavailable("away", limit="", retry_after_ms=1), 1013),
        (LeaseLost("the permit is lost"), 1013),
        (StoreUnavailable("away"), 1013),
        (IssuerUnavailable("away"), 1013),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_session_that_may_be_opened_again_closes_with_1013(
    error: TidegateError, code: int
) -> None:
    assert code_of(error) == code
