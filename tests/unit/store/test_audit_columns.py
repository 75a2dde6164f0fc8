"""A column of the audit record is written on each path: copied, kept on disk, at a job's end."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest

from tidegate.store import audit
from tidegate.store.database import sql
from tidegate.store.records import audit_row

# A row of a job's end has the current time, and its request's row has the rest.
OF_CALLS_ALONE = {"created_at", "endpoint", "http_status", "streamed"}
ENDED: dict[str, Any] = {"status": "succeeded", "prompt": ""}


def columns_of(name: str) -> tuple[list[str], list[str], list[str]]:
    """Return the columns that an insertion from JSON writes, selects and reads."""
    found = re.fullmatch(
        r"INSERT INTO audit \((?P<written>[^)]*)\)\s+SELECT (?P<selected>.*?)\s+"
        r"FROM json_to_recordset\(\$1::json\) AS row \((?P<read>[^)]*)\).*",
        sql(name),
        re.DOTALL,
    )
    assert found is not None
    written, selected, read = (re.split(r",\s*", found[part]) for part in found.groupdict())
    return written, selected, [column.split()[0] for column in read]


@pytest.mark.parametrize("name", ["add_relayed", "add_audit"])
def test_each_column_is_read_and_written_in_its_place(name: str) -> None:
    written, selected, read = columns_of(name)
    assert written == selected
    assert set(read) == set(written)


def test_calls_kept_on_disk_have_the_columns_of_those_that_are_copied() -> None:
    assert set(columns_of("add_relayed")[0]) == set(audit._AUDIT_COLUMNS)


def test_jobs_and_streams_have_all_columns_but_those_of_native_calls() -> None:
    row = audit_row(defaultdict(lambda: None, ENDED), {}, "worker-1", None)
    assert set(columns_of("add_audit")[0]) == row.keys()
    assert row.keys() == set(audit._AUDIT_COLUMNS) - OF_CALLS_ALONE
