"""Streams and long polls of a tenant: counted while they are open, whatever ends them."""

from __future__ import annotations

from functools import partial

import pytest

from tidegate.call import Caller, Caps
from tidegate.errors import QuotaExceeded, TooManyFollowers
from tidegate.http import services as bounds
from tidegate.http.services import Openings


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


@pytest.mark.parametrize("sort", ["follower", "long_poll"])
def test_no_number_of_tenants_takes_all_that_a_process_can_have(
    monkeypatch: pytest.MonkeyPatch, sort: str
) -> None:
    monkeypatch.setattr(bounds, "MOST_FOLLOWERS", 100)
    monkeypatch.setattr(bounds, "MOST_LONG_POLLS", 100)
    openings, left = Openings(), 100
    for number in range(5):
        open_one = partial(getattr(openings, sort), Caller(f"t{number}", key_id="k"))
        share = (left + 1) // 2  # half of what the others leave
        for _ in range(share):
            open_one()
        with pytest.raises((QuotaExceeded, TooManyFollowers)):
            open_one()
        left -= share
    assert getattr(openings, sort)(Caller("one-more", key_id="k"))


def test_without_keys_all_is_for_all() -> None:
    openings = Openings()
    for _ in range(bounds.MOST_FOLLOWERS):
        openings.follower(Caller())
    with pytest.raises(TooManyFollowers) as refused:
        openings.follower(Caller("another"))
    assert refused.value.retry_after_ms


def test_followers_count_for_the_cap_on_long_polls() -> None:
    openings = Openings()
    capped = Caller("acme", key_id="k", caps=Caps(most_long_polls=2))
    with openings.follower(capped), openings.long_poll(capped):
        assert repr(openings) == "<Openings streams=0 polls=2>"
        for sort in (openings.follower, openings.long_poll):
            with pytest.raises(QuotaExceeded) as refused:
                sort(capped)
            assert refused.value.limit == "most_long_polls"
