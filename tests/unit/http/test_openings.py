"""Streams and long polls of a tenant: counted while they are open, whatever ends them."""

from __future__ import annotations

import pytest

from tidegate.call import Caller, Caps
from tidegate.errors import QuotaExceeded
from tidegate.http.openings import Openings


def test_one_more_than_the_cap_is_refused_until_one_closes() -> None:
    openings = Openings()
    acme = Caller("acme", caps=Caps(most_streams=2, most_long_polls=0))
    first, second = openings.stream(acme), openings.stream(acme)
    with pytest.raises(QuotaExceeded) as refused:
        openings.stream(acme)
    assert refused.value.limit == "most_streams"
    assert "at most 2 open streams" in refused.value.allowed
    first.close()
    first.close()
    openings.stream(acme).close()
    second.close()
    with pytest.raises(QuotaExceeded):
        openings.long_poll(acme)
    assert repr(openings) == "<Openings streams=0 polls=0>"


def test_tenants_do_not_count_for_each_other_and_none_is_no_bound() -> None:
    openings = Openings()
    capped = Caller("acme", caps=Caps(most_streams=1))
    kept = [openings.stream(Caller("other")) for _ in range(100)]
    with openings.stream(capped), pytest.raises(QuotaExceeded):
        openings.stream(capped)
    with openings.stream(capped):
        pass
    for one in kept:
        one.close()
    assert not openings._streams
