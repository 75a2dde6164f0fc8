"""Ways of the data through the files of the code: how many, and how often they change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.ways import GOALS, Goal, measure
from tidegate.embedded.servers import ValkeyServer

# What the ways have come to. It may only shrink, down to the goals, which are in scripts/ways.py:
# `python scripts/ways.py --order` prints which files a call enters, and where it goes back and
# forth. The changes vary from run to run, most on a busy machine, as messages to Valkey are sent
# together or one by one: the fewest of up to forty runs count.
REACHED = {
    "relayed call": Goal(44, 154),  # 43 before the parsing of bodies had a module of its own
    "acquire to grant": Goal(6, 26),
    "submit to webhook": Goal(60, 270),
    "limits set to in force": Goal(23, 165),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason="traces with sys.monitoring")
@pytest.mark.timeout(300)
def test_a_call_enters_no_more_files_and_changes_between_them_no_more_often(
    tmp_path: Path, own_valkey: ValkeyServer, database_url: str
) -> None:
    ways = measure(tmp_path, own_valkey.url, database_url, bounds=REACHED)
    assert ways.keys() == REACHED.keys() == GOALS.keys()
    more = {
        name: (way.files, way.changes, sorted({file for _, _, file, _ in way.entries}))
        for name, way in ways.items()
        if not way.is_within(REACHED[name])
    }
    assert more == {}
