"""`tidegate rehearse` as a person runs it: from a file, with no server anywhere."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.commands import Done, ran
from tests.markdown import blocks, text_of

LOAD = """
lasts = "30s"

[[arrivals]]
tenant = "acme"
per_second = 12
duration_ms = 500
deadline_ms = 2000

[[arrivals]]
tenant = "globex"
per_second = 2
duration_ms = 500
"""


async def rehearse(folder: Path, *arguments: str, text: str = LOAD) -> Done:
    (folder / "load.toml").write_text(text)
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONIOENCODING": "utf-8"}
    return await ran("rehearse", *arguments, cwd=folder, env=env)


async def test_tables_a_picture_a_page_and_the_trace_that_was_played(tmp_path: Path) -> None:
    written = [f"--{kind}={tmp_path / f'out.{kind}'}" for kind in ("svg", "html")]
    done = await rehearse(tmp_path, "load.toml", *written, "--trace", "out.csv")
    assert done.code == 0, done.complained
    assert "bottleneck: kind:text_only" in done.said
    assert "would have been 429s" in done.said
    assert "█" in done.said
    svg = ElementTree.parse(tmp_path / "out.svg").getroot()
    assert svg.tag.endswith("svg")
    assert "<script" not in (page := (tmp_path / "out.html").read_text())
    assert "share of kind:text_only" in page
    again = await rehearse(tmp_path, "out.csv")
    assert again.said.splitlines()[0] == done.said.splitlines()[0]


async def test_twice_as_many_calls_use_twice_as_much_of_a_days_quota_and_budget(
    tmp_path: Path,
) -> None:
    text = """
lasts = "20h"
[[arrivals]]
tenant = "acme"
model = "m"
pattern = "constant"
per_hour = 3
duration_ms = 500
deadline_ms = 1000
cost_usd = 0.01
[budgets.acme]
usd = 0.90
period = "day"
"""
    policy = '[limits]\n"kind:text_only" = 5\n"rpd:m" = 100\n'
    (tmp_path / "policy.toml").write_text(policy)
    arguments = ("load.toml", "--policy", "policy.toml", "--times", "2", "--json")
    done = await rehearse(tmp_path, *arguments, text=text)
    assert done.code == 0, done.complained
    # Of twice 59 calls a hundred have room in the quota, and some others none in the budget.
    assert (done.json["calls"], done.json["admitted"]) == (118, 100)
    assert done.json["refused"] == {"budget spent": 6, "used up": 12}
    assert done.json["span_ms"] > 19 * 3_600_000


async def test_changes_are_compared_side_by_side(tmp_path: Path) -> None:
    changes = ("--set", "kind:text_only=8", "--set", "kind:text_only=8; weights.globex=4")
    done = await rehearse(tmp_path, "load.toml", "--json", *changes)
    assert done.code == 0, done.complained
    as_it_is, more, weighted = done.json
    assert as_it_is["name"] == "as it is"
    assert as_it_is["refused"]["deadline"] > 50
    assert sum(more["refused"].values()) < 20
    assert weighted["name"] == "kind:text_only=8; weights.globex=4"


async def test_lines_give_way_by_a_change_and_by_their_upstream(tmp_path: Path) -> None:
    text = """
lasts = "60s"
[[arrivals]]
tenant = "nightly"
pattern = "bursts"
burst = 1
every = "60s"
duration_ms = 40_000
priority = -100
gives_way = true
[[arrivals]]
tenant = "live"
pattern = "constant"
per_minute = 5
until = "13s"
duration_ms = 1000
"""
    policy = '[limits]\n"kind:text_only" = 1\n'
    (tmp_path / "policy.toml").write_text(policy)
    arguments = ("load.toml", "--policy", "policy.toml")
    done = await rehearse(tmp_path, *arguments, "--set", "preempt=true", "--json", text=text)
    assert done.code == 0, done.complained
    now, changed = done.json
    assert (now["gave_way"], changed["gave_way"], changed["name"]) == (0, 1, "preempt=true")
    # The live call comes after 12 s: it waits for the line's other 28, or for a second and a read.
    longest_ms = [case["tenants"][0]["waits"]["longest_ms"] for case in (now, changed)]
    assert longest_ms[0] == pytest.approx(28_000, abs=50)
    assert 1_000 <= longest_ms[1] <= 1_600
    assert changed["lost_ms"] == pytest.approx(12_000 + longest_ms[1], abs=50)
    (tmp_path / "tidegate.toml").write_text(
        UPSTREAM.replace("[upstreams.x]", "[upstreams.x]\npreempt = { after_ms = 200 }", 1)
    )
    by_upstream = await rehearse(tmp_path, *arguments, "--pool", "x", text=text)
    assert by_upstream.code == 0, by_upstream.complained
    assert "calls gave way once" in " ".join(by_upstream.said.split())


async def test_jobs_choose_their_tiers_at_the_prices_of_the_upstream(tmp_path: Path) -> None:
    text = """
lasts = "60s"
[[arrivals]]
model = "m"
pattern = "bursts"
burst = 20
every = "60s"
duration_ms = 2000
input_tokens = 1000000
tiers = ["flex", "batch"]
"""
    upstream = UPSTREAM + "tiers = { flex = { share = 0.5 }, batch = { share = 0.5 } }\n"
    limits = '[upstreams.x.limits]\n"pool:total" = 1\n'
    (tmp_path / "tidegate.toml").write_text(upstream + limits)
    options = ("--flex-times", "3", "--batch-time", "30m", "--json")
    changes = ("--set", "pool:total=2")
    done = await rehearse(tmp_path, "load.toml", "--pool", "x", *changes, *options, text=text)
    assert done.code == 0, done.complained
    # A job waits for flex where calls of 10 s before it take at most a minute.
    told = [{one["tier"]: one for one in case["tiers"]} for case in done.json]
    assert [{tier: one["jobs"] for tier, one in case.items()} for case in told] == [
        {"flex": 7, "batch": 13},
        {"flex": 13, "batch": 7},
    ]
    for case in told:
        assert [one["cost_micros"] for one in case.values()] == [
            one["jobs"] * 500_000 for one in case.values()
        ]
    assert told[0]["flex"]["took"]["longest_ms"] == pytest.approx(7 * 6_000, abs=50)
    assert told[0]["batch"]["took"]["longest_ms"] == pytest.approx(1_800_000, abs=5)


@pytest.mark.slow
async def test_the_lines_of_rehearse_md_say_what_it_shows(tmp_path: Path) -> None:
    described, shown = "", []
    for block in blocks("docs/rehearse.md"):
        if block.language == "toml":
            described = block.text
        elif block.language == "sh":
            (tmp_path / "load.toml").write_text(described)
            command, *arguments = shlex.split(block.text)
            assert command == "tidegate"
            done = await rehearse(tmp_path, *arguments[1:], text=described)
            shown = [line.rstrip() for line in done.said.splitlines()]
        elif block.language == "text" and shown:
            missing = [line for line in block.text.splitlines() if line and line not in shown]
            assert missing == []
            shown = []
    trace = text_of("docs/rehearse.md").split("```text\n  time_ms,")[1].split("```")[0]
    (tmp_path / "trace.csv").write_text("time_ms," + trace.replace("  ", ""))
    assert (await rehearse(tmp_path, "trace.csv")).code == 0


async def test_wrong_use_is_told_in_one_line(tmp_path: Path) -> None:
    for arguments, what in (
        ((), "needs either a file or --from-record"),
        (("--from-record", "--since", "1h"), "such as --from-record 1h"),
        (("none.toml",), "none.toml=(file): must be readable"),
        (("load.toml", "--set", "kind:text_only=many"), "limits.kind:text_only=many"),
        (("load.toml", "--set", "kind:text_only"), "must be KEY=VALUE"),
        (("load.toml", "--set", " ; "), "must be KEY=VALUE"),
        (("load.toml", "--set", "preempt=often"), "preempt=often"),
        (("load.toml", "--batch-time", "soon"), "--batch-time=soon"),
    ):
        done = await rehearse(tmp_path, *arguments)
        assert done.code == 2
        assert done.complained.startswith("tidegate: ")
        assert what in done.complained
        assert done.complained.count("\n") == 1


UPSTREAM = """
[upstreams.x]
dialect = "openai"
base_url = "http://127.0.0.1:1/v1"
key_file = "/run/secrets/not-on-this-machine"
proxy = "env:PROXY"
[upstreams.x.headers]
X-Team = "env:TEAM"
[upstreams.x.prices.m]
input = 1.0
output = 2.0
"""


async def test_prices_need_no_keys_and_a_wrong_upstream_is_named(tmp_path: Path) -> None:
    text = 'lasts = "4s"\n[[arrivals]]\nmodel = "m"\npattern = "constant"\nper_second = 1\n'
    text += "duration_ms = 500\ninput_tokens = 1000000\n"
    (tmp_path / "tidegate.toml").write_text(UPSTREAM)
    done = await rehearse(tmp_path, "load.toml", "--pool", "x", "--json", text=text)
    assert done.code == 0, done.complained
    assert done.json["cost_micros"] == done.json["calls"] * 1_000_000 > 0
    (tmp_path / "tidegate.toml").write_text(UPSTREAM.replace("[upstreams.x]", "[upstreams.x]\nw=1"))
    done = await rehearse(tmp_path, "load.toml", text=text)
    assert done.code == 2
    assert done.complained.startswith("tidegate: tidegate.toml: upstreams.x.w")
