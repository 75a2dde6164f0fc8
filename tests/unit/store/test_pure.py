"""What needs no database: the statements' names, the text PostgreSQL can hold, who may judge."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest

from tidegate.call import Answer, Usage
from tidegate.errors import ConfigError
from tidegate.record import CallRecord, Failure
from tidegate.store import database as queries
from tidegate.store import notifications
from tidegate.store import records as rows
from tidegate.store.audit import inline_row, unpack
from tidegate.store.notifications import Steadiness
from tidegate.store.tenants import check_changes

FOLDER = Path(queries.__file__).parent


def test_every_statement_is_described_in_one_line_and_used() -> None:
    text = "".join(path.read_text() for path in (FOLDER / "sql").glob("*.sql"))
    assert text.count("-- name: ") == len(queries.QUERIES) > 30
    code = "".join(path.read_text() for path in FOLDER.rglob("*.py"))
    for query in queries.QUERIES.values():
        assert re.fullmatch(r"[A-Z].{10,98}[.:]?.*\.", query.does), query
        assert f'"{query.name}"' in code, f"{query.name} is used nowhere"
        assert ";" not in query.sql


def test_text_is_made_such_that_postgresql_can_hold_it() -> None:
    assert rows.clean("caf\u00e9 \U0001f98a") == "caf\u00e9 \U0001f98a"
    assert rows.clean("a\x00b") == "a\ufffdb"
    assert rows.clean("\ud83d half") == "? half"
    nested = {"a": ["\x00", {"b": "\ud800"}], "n": 3, "none": None}
    assert rows.cleaned(nested) == {"a": ["\ufffd", {"b": "?"}], "n": 3, "none": None}


async def test_json_of_a_large_result_is_made_in_pieces() -> None:
    """Between which the event loop does other work."""
    text = 'say "é\n\U0001f30a" ' * 200_000
    attempt, turns = {"result": text, "model": "m"}, 0
    making = asyncio.create_task(rows.make_json(attempt))
    while not making.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > len(text) / 1_000_000
    assert orjson.loads(orjson.dumps(attempt))["result"] == text
    assert rows.size_of(rows.entry_of("end", attempt)) >= len(text)
    small = {"result": "x"}
    await rows.make_json(small)
    assert small == {"result": "x"}


def test_unknown_and_absurd_usage_stays_null_and_never_becomes_zero() -> None:
    now = datetime.now(UTC)
    usage = Usage(input_tokens=0, output_tokens=None, thoughts_tokens=-1, total_tokens=2**70)
    row = rows.result_row(
        CallRecord(
            "job",
            "t",
            now,
            model="m",
            fence=(1, 1),
            admitted_at=now,
            finished_at=now,
            queue_ms=0.0,
            upstream_ms=float("nan"),
            answer=Answer(usage=usage),
        )
    )
    assert [row[column] for column in rows.USAGE_COLUMNS] == [0, None, None, None, None]
    assert orjson.loads(rows.dumps([row]))[0]["upstream_ms"] is None


def test_a_failure_survives_its_row() -> None:
    failure = Failure("upstream_throttled", "slow\x00 down", True, 1500, 429)
    row = rows.failure_row(failure)
    assert row is not None
    assert row["message"] == "slow\ufffd down"
    assert (row["retry_after_ms"], row["upstream_status"]) == (1500, 429)


def test_a_body_unpacks_to_what_was_packed() -> None:
    import base64

    for size in (0, 4_000, 4_096, 10_000):
        row = inline_row("request", {"prompt": "p" * size})
        packed = base64.b64decode(row["data"])
        assert len(packed) < 200
        assert size < row["size_bytes"]
        assert unpack(row["encoding"], packed) == {"prompt": "p" * size}


def test_only_a_whole_lease_of_heartbeats_without_a_gap_lets_a_process_judge() -> None:
    lease_ms = 3_000
    now = Steadiness.clock()

    def judged(beats_before_s: list[float]) -> bool:
        steadiness = Steadiness(lease_ms)
        for before_s in beats_before_s:
            steadiness.beaten(now - before_s)
        return steadiness.may_judge

    assert judged([3.5, 2.5, 1.5, 0.5])
    assert not judged([])
    assert not judged([2.0, 1.0, 0.0])  # not yet a whole lease
    assert not judged([9.0, 2.5, 1.5, 0.5])  # a gap starts the clock anew
    assert not judged([6.5, 5.5, 4.5, 3.5])  # was steady, and has been silent since


def test_loops_that_wait_for_beats_wake_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "_PHASE_S", 0.25)
    for started_s in (100.0, 100.03, 100.4, 100.77, 100.999):
        monkeypatch.setattr("time.monotonic", lambda at=started_s: at)
        for every_s in (1.0, 2.0, 5.0):
            wait_s = notifications.next_beat_s(every_s)
            beats = (started_s + wait_s - 0.25) / every_s
            assert beats == pytest.approx(round(beats), abs=1e-6)
            assert every_s / 10 < wait_s <= every_s * 1.1


def test_a_missed_heartbeat_starts_the_clock_anew() -> None:
    steadiness = Steadiness(300)
    now = Steadiness.clock()
    for before_s in (0.35, 0.25, 0.15):
        steadiness.beaten(now - before_s)
    assert state_of(steadiness) == (True, True)
    steadiness.missed()
    assert state_of(steadiness) == (False, False)
    steadiness.beaten(now)
    assert state_of(steadiness) == (True, False)


def state_of(steadiness: Steadiness) -> tuple[bool, bool]:
    return steadiness.fresh, steadiness.may_judge


@pytest.mark.parametrize("name", ["retention_days", "most_streams", "most_long_polls"])
def test_no_number_of_a_tenant_is_larger_than_its_column_holds(name: str) -> None:
    check_changes({name: 100_000})
    with pytest.raises(ConfigError, match=f"{name}=3000000000: must be a whole number from"):
        check_changes({name: 3_000_000_000})


@pytest.mark.parametrize("name", ["budget_day_money", "budget_month_money"])
def test_less_than_a_micro_dollar_a_tenant_is_refused_and_not_rounded_to_nothing(name: str) -> None:
    """A budget of $0 rejects all calls of the tenant."""
    for usd in (0, 0.000001, 0.79, 250, 123_456_789.123456):
        check_changes({name: usd})
    for usd in (0.0000001, 1e-9, 0.7900001):
        with pytest.raises(ConfigError, match=f"{name}=.* whole micro-dollars, such as 0.000001"):
            check_changes({name: usd})
