"""What a process tells the others: as it was written, whatever version wrote it."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import orjson

from tidegate.metrics.process import Note, Notes, UpstreamFound, packed, unpacked
from tidegate.record import ActiveCall, ActiveCalls, CallRecord

AT = datetime(2030, 1, 31, 12, 30, 0, 250_000, tzinfo=UTC)
CALL = ActiveCall("1", "acme", "relay", AT, AT, kind="text_only", limits=("kind:x", "rpm:y"))
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
    calls, here = [CallRecord("stream", "t", AT, UUID(int=n)) for n in range(4)], ActiveCalls()
    for call in calls:
        here.enter(call)
    here.leave(calls[0])
    here.leave(calls[0])
    assert [one.request_id for one in here.oldest(2)] == [str(UUID(int=1)), str(UUID(int=2))]
    assert repr(here) == "<ActiveCalls 3>"


def test_a_name_that_a_client_made_up_is_cut() -> None:
    call = CallRecord("stream", "t", AT, model="m" * 1_000_000)
    assert ActiveCall.of(call).model == "m" * 200
    call.model = None
    assert ActiveCall.of(call).model is None
