"""`tidegate erase` and `prune`, and what a person is asked and told."""

from __future__ import annotations

import os

from tests.commands import tidegate
from tests.gateway import Opener
from tests.integration.accounting.test_erase import SUBJECT, called_chat
from tests.waiting import wait_until


async def test_a_subject_is_erased_from_the_terminal(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for subject in (SUBJECT, "another"):
        await called_chat(gateway, "Why?", **{"x-tidegate-subject": subject})
    rows = "SELECT count(*) = {} FROM audit"
    await wait_until(lambda: gateway.database.fetchval(rows.format(2)), 20)
    counted = await tidegate(gateway, "erase", "--subject", SUBJECT, "--dry-run", "--json")
    assert (counted.json["calls"], counted.json["done"]) == (1, False)
    unsure = await tidegate(gateway, "erase", "--subject", SUBJECT)
    assert unsure.code == 1, "asked, nobody said yes"
    assert await gateway.database.fetchval(rows.format(2))
    erased = await tidegate(gateway, "erase", "--subject", SUBJECT, "--tenant", "default", "--yes")
    assert erased.code == 0
    assert erased.said.startswith("erased 0 requests, 1 records of calls, ")
    assert await gateway.database.fetchval("SELECT array_agg(subject) FROM audit") == ["another"]
    nobody = await tidegate(gateway, "erase", "--yes")
    assert (nobody.code, nobody.complained.count("\n")) == (2, 1)


async def test_prune_removes_the_parts_of_uploads_of_killed_processes(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    folder = gateway.config.data_dir / "tmp"
    folder.mkdir(exist_ok=True)
    old, new = folder / "upload-of-the-dead", folder / "upload-under-way"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    done = await tidegate(gateway, "prune", DATA_DIR=str(gateway.config.data_dir))
    assert done.code == 0, done.complained
    assert (old.exists(), new.exists()) == (False, True)
