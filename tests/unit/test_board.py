"""What a process tells the others: as it was written, whatever version wrote it."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson

from tidegate.metrics.process import Note, Notes, UpstreamFound, packed, unpacked
from tidegate.spine.record import MOST_CHARS, CallUnderWay, UnderWay, shortened

AT = datetime(2030, 1, 31, 12, 30, 0, 250_000, tzinfo=UTC)
CALL = CallUnderWay("1", "acme", "relay", AT, AT, kind="text_only", limits=("kind:x", "rpm:y"))
NOTE = Note("api-1", 1, (CALL,), {"gemini": UpstreamFound("out", True, 5, "why")})


def test_a_note_comes_back_as_it_was() -> None:
    assert unpacked(packed(NOTE)) == NOTE


def test_what_a_newer_version_has_added_is_passed_over() -> None:
    told = orjson.loads(packed(NOTE))
    told["newer"] = told["calls"][0]["newer"] = told["upstreams"]["gemini"]["newer"] = 1
    assert unpacked(orjson.dumps(told)) == NOTE


def test_it_is_not_the_whole_where_a_process_has_more_or_was_not_heard() -> None:
    assert Notes([NOTE], True).whole
    assert not Notes([NOTE], False).whole
    assert not Notes([NOTE, Note("api-2", 2, (CALL,))], True).whole


def test_the_oldest_that_are_left_are_told_and_none_is_told_twice() -> None:
    calls, here = [object() for _ in range(4)], UnderWay()
    for number, call in enumerate(calls):
        here.enter(call, lambda n=number: CallUnderWay(str(n), "t", "stream", AT))  # type: ignore[misc]
    here.leave(calls[0])
    here.leave(calls[0])
    assert [one.request_id for one in here.oldest(2)] == ["1", "2"]
    assert repr(here) == "<UnderWay calls=3>"


def test_a_name_that_a_client_made_up_is_cut() -> None:
    assert shortened("m" * 1_000_000) == "m" * MOST_CHARS
    assert shortened(None) is None
