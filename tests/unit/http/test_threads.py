"""The tree of a conversation's calls: threads, what each hangs under, and how that is known."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from time import thread_time
from uuid import UUID

from tidegate.call import Status, Usage
from tidegate.http.admin.conversations import threads_of
from tidegate.record import Lineage
from tidegate.store.requests import ConversationCall

START = datetime(2026, 1, 1, tzinfo=UTC)
Tree = list[tuple[list[int], int | None, str | None]]


def call(
    number: int, begin_s: float, end_s: float, tokens: int | None = None, **lineage: object
) -> ConversationCall:
    return ConversationCall(
        request_id=UUID(int=number),
        source="relay",
        status=Status.SUCCEEDED,
        endpoint="/v1/messages",
        model="m",
        upstream="u",
        attempts=1,
        submitted_at=START + timedelta(seconds=begin_s),
        admitted_at=None,
        finished_at=START + timedelta(seconds=end_s),
        queue_ms=0.0,
        upstream_ms=0.0,
        first_byte_ms=None,
        usage=Usage(tokens),
        usage_state=None,
        cost_micros=None,
        failure_code=None,
        lineage=Lineage("talk", **lineage),  # type: ignore[arg-type]
    )


def tree(*calls: ConversationCall) -> Tree:
    """Of each thread: its calls, and what it hangs under."""
    return [
        (
            [one.request_id.int for one in thread.calls],
            None if thread.under is None else thread.under.request_id.int,
            thread.by,
        )
        for thread in threads_of(calls)
    ]


def test_an_agent_that_waits_for_another_one_has_it_below_the_call_before() -> None:
    title = call(1, 0, 9, opening="title")  # beside the first call of the agent
    main = [call(2, 0, 1, opening="main"), call(6, 10, 11, opening="main")]
    child = [call(3, 2, 3, opening="child"), call(5, 6, 7, opening="child")]
    grandchild = call(4, 4, 5, opening="grandchild")
    found = tree(title, main[0], child[0], grandchild, child[1], main[1])
    assert found == [
        ([1], None, None),
        ([2, 6], None, None),
        ([3, 5], 2, "time"),
        ([4], 3, "time"),
    ]


def test_an_agent_that_begins_again_has_a_thread_again() -> None:
    main = [call(1, 0, 1, 50, opening="main"), call(8, 20, 21, 90, opening="main")]
    runs = [
        *(call(2, 2, 3, 10, opening="child"), call(3, 4, 5, 20, opening="child")),
        *(call(4, 6, 7, 10, opening="child"), call(5, 8, 9, None, opening="child")),
        call(6, 10, 11, 30, opening="child"),
    ]
    assert tree(main[0], *runs, main[1]) == [
        ([1, 8], None, None),
        ([2, 3], 1, "time"),
        ([4, 5, 6], 1, "time"),
    ]
    same = [call(number, number, number + 0.5, 10, opening="poll") for number in range(3)]
    assert tree(*same) == [([0, 1, 2], None, None)]


def test_a_continued_answer_is_the_same_thread_and_a_second_one_from_it_a_branch() -> None:
    first = call(1, 0, 1, opening="a")
    second = call(2, 2, 3, opening="b", parent_id=UUID(int=1))
    third = call(3, 4, 5, opening="c", parent_id=UUID(int=2))
    other = call(4, 6, 7, opening="d", parent_id=UUID(int=1))
    assert tree(first, second, third, other) == [([1, 2, 3], None, None), ([4], 1, "answer")]
    gone = call(5, 8, 9, opening="e", parent_id=UUID(int=77))
    assert tree(first, gone) == [([1], None, None), ([5], None, None)]


def test_a_child_in_the_trace_hangs_below_its_span() -> None:
    caller = call(0xABC, 0, 9, opening="a")
    below = call(2, 1, 2, opening="b", trace_id="t", parent_span=f"{0xABC:016x}")
    foreign = call(3, 3, 4, opening="c", trace_id="t", parent_span="00000000000000ff")
    assert tree(caller, below, foreign) == [
        ([0xABC], None, None),
        ([2], 0xABC, "trace"),
        ([3], None, None),
    ]


def test_what_contradicts_itself_and_what_ended_twice_is_still_a_tree() -> None:
    one = call(1, 0, 1, opening="a", parent_span=f"{2:016x}")
    two = call(2, 2, 3, opening="b", parent_span=f"{1:016x}")
    itself = call(3, 4, 5, opening="c", parent_span=f"{3:016x}", parent_id=UUID(int=3))
    later = call(4, 6, 7, opening="d", parent_span=f"{1:016x}")
    assert tree(one, two, itself, later) == [
        ([1], None, None),
        ([2], 1, "trace"),
        ([3], None, None),
        ([4], 1, "trace"),
    ]
    again = call(3, 6, 7, opening="c")
    assert tree(itself, again) == [([3, 3], None, None)]


def test_thousands_of_threads_take_no_longer_for_each() -> None:
    calls = [
        call(number, number, number + 0.5, opening=f"{number % 1_000}") for number in range(2_000)
    ]
    began = thread_time()
    assert len(threads_of(calls)) == 1_000
    assert thread_time() - began < 2
