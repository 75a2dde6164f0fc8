"""A walk of an operator through the dashboard: its clicks counted, each step pictured, and the
record of past days on which there is something to find.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import randbits
from time import perf_counter
from uuid import UUID

import asyncpg
import orjson
from playwright.async_api import Locator, Page, expect

from tests.browser.stage import PAGE_ALONE, shoot

MOST_CLICKS = 5
_LEAST, _MOST, _AROUND = 240, 540, 8
_LEAST_OF_A_DIALOG = 130
_OUTLINE = """(one, on) => { one.style.outline = on ? "3px solid #e8590c" : "";
    one.style.outlineOffset = on ? "-2px" : ""; }"""

# Whether the outline of what has the focus is cut by what scrolls around it.
OUTLINE_IS_CUT = """(one) => {
    const { outlineWidth, outlineOffset } = getComputedStyle(one);
    const wide = parseFloat(outlineWidth) + parseFloat(outlineOffset);
    let around = one.parentElement;
    while (getComputedStyle(around).overflow === "visible") around = around.parentElement;
    const [inner, outer] = [one.getBoundingClientRect(), around.getBoundingClientRect()];
    return inner.right + wide > outer.right || inner.left - wide < outer.left;
}"""
# By how much a limit's waiting calls, with a line of the recent ones, need more room than there is.
WAITING_CUT = """(row) => {
    const waiting = row.querySelector(".limit-waiting");
    waiting.querySelector("polyline").setAttribute("points", "0,16 30,0 60,16");
    waiting.querySelector(".figures").textContent = "1.2k";
    const parts = [waiting, ...waiting.querySelectorAll("span")];
    const shown = parts.filter((one) => getComputedStyle(one).position === "static");
    return Math.max(...shown.map((one) => one.scrollWidth - one.clientWidth));
}"""
# How far a limit's buttons are from the edge of its row, of which its padding is a part.
EDGE = """(row) => row.getBoundingClientRect().right
    - row.querySelector(".limit-actions").getBoundingClientRect().right"""
# The heights of the names of an upstream's facts: each is one line.
NAMES = """(one) => [...one.querySelectorAll("dt")]
    .map((dt) => dt.getBoundingClientRect().height).filter(Boolean)"""


@dataclass(slots=True)
class Walk:
    """One task, begun on the Overview. A choice from a list is two clicks: it opens, and is taken.
    Every step has a picture in `folder`, with its target in a frame; walks.txt in `figures` gets
    name, clicks, characters typed and seconds without the pictures."""

    page: Page
    name: str
    folder: Path
    figures: Path
    clicks: int = 0
    characters: int = 0
    began: float = 0.0
    steps: int = 0
    taking_s: float = 0.0

    async def begin(self) -> Walk:
        await self.page.evaluate(PAGE_ALONE)  # without the messages of the last task
        await self.page.get_by_role("link", name="Overview", exact=True).click()
        await expect(self.page.locator("#live")).to_have_text("Live")
        self.began = perf_counter()
        return self

    async def click(self, target: Locator, around: Locator | None = None) -> None:
        await self._picture(target, around)
        self.clicks += 1
        await target.click()

    async def choose(self, target: Locator, value: str, around: Locator | None = None) -> None:
        await self._picture(target, around)
        self.clicks += 2
        await target.select_option(value)

    async def type(self, target: Locator, text: str) -> None:
        """Into a field that has the focus, or is one click away."""
        self.clicks += not await target.evaluate("(one) => one === document.activeElement")
        self.characters += len(text)
        await target.fill(text)

    async def end(self, found: Locator, around: Locator | None = None) -> None:
        """`found` says that the task is done, in no more clicks than it may take."""
        await expect(found.first).to_be_visible()
        walked_s = perf_counter() - self.began - self.taking_s
        await self._picture(found.first, around)
        assert self.clicks <= MOST_CLICKS, (self.name, self.clicks)
        with (self.figures / "walks.txt").open("a", encoding="utf-8") as file:
            file.write(f"{self.name} {self.clicks} {self.characters} {walked_s:.1f}\n")

    async def _picture(self, target: Locator, around: Locator | None) -> None:
        """A strip of the window where the target is, or what is `around` it."""
        began = perf_counter()
        await expect(target).to_be_visible()
        await target.scroll_into_view_if_needed()
        await target.evaluate(_OUTLINE, True)
        box, inner = await (around or target).bounding_box(), await target.bounding_box()
        size = self.page.viewport_size
        assert box is not None
        assert inner is not None
        assert size is not None
        left, width, top, height = 0.0, float(size["width"]), box["y"] - _AROUND, box["height"]
        is_dialog = box["height"] > _LEAST_OF_A_DIALOG and box["width"] < size["width"] / 2
        least = _LEAST_OF_A_DIALOG if is_dialog else _LEAST
        height = max(least, min(_MOST, height + 2 * _AROUND))
        if around is None or not top <= inner["y"] <= top + height - inner["height"]:
            top = inner["y"] + inner["height"] / 2 - height / 2
        if is_dialog:
            left, width = box["x"] - _AROUND, box["width"] + 2 * _AROUND
        top = max(0.0, min(top, size["height"] - height))
        clip = {"x": left, "y": top, "width": width, "height": height}
        self.steps += 1
        file = self.folder / f"{self.name}-{self.steps}.png"
        await shoot(self.page, file, clip=clip)
        await target.evaluate(_OUTLINE, False)
        self.taking_s += perf_counter() - began


def id_at(at: datetime) -> UUID:
    """An id that was made then, as ours tell their time."""
    ms = int(at.timestamp() * 1_000)
    return UUID(int=ms << 80 | 7 << 76 | randbits(12) << 64 | 2 << 62 | randbits(62))


def midnight(days: int) -> datetime:
    """The beginning of a day in the zone of this machine; of today for 0."""
    today = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
    return (today + timedelta(days=days)).replace(tzinfo=None).astimezone()


async def slow_monday(database: asyncpg.Pool) -> datetime:
    """Calls of the last Monday before today, and no others: from 9 to 11 those of acme waited for
    text."""
    monday = midnight(-1)
    while monday.weekday() != 0:
        monday -= timedelta(days=1)
    monday = monday.replace(tzinfo=None).astimezone()
    rows = []
    for number in range(24 * 20):
        at = monday + timedelta(minutes=3 * number)
        is_slow = at.hour in (9, 10)
        tenant = "acme" if is_slow and number % 5 else ("globex", "acme")[number % 2]
        waited_ms = 9_000 + 150 * (number % 20) if is_slow else 20 + number % 9
        called_ms = 900 + 10 * (number % 30)
        admitted = at + timedelta(milliseconds=waited_ms)
        rows.append(
            (
                *(id_at(at), at, tenant, "gemini", "gemini", "relay", "succeeded", "text_only"),
                *("body", "", 0, "gemini-2.5-flash", 1, 0, "api-1", at, admitted),
                *(admitted + timedelta(milliseconds=called_ms), float(waited_ms), float(called_ms)),
                "/v1/chat/completions",
            )
        )
    within = (monday, monday + timedelta(days=1))
    await database.execute("DELETE FROM audit WHERE created_at >= $1 AND created_at < $2", *within)
    await database.executemany(
        "INSERT INTO audit (id, created_at, tenant_id, pool, upstream, source, status, kind,"
        " classified_by, classified_reason, priority, model, attempts, lapses, instance_id,"
        " submitted_at, admitted_at, finished_at, queue_ms, upstream_ms, endpoint, request_id)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18,"
        " $19, $20, $21, $1)",
        rows,
    )
    return monday


async def as_of(database: asyncpg.Pool, request_id: str, at: datetime) -> str:
    """A copy of a job that has ended, with its audit row, as if it were submitted then; in a
    partition of the day, as it would be: the audit's others are not searched for words."""
    made, day = id_at(at), at.astimezone(UTC).date()
    await database.execute(
        f"CREATE TABLE IF NOT EXISTS audit_{day:%Y%m%d} PARTITION OF audit FOR VALUES"
        f" FROM ('{day} 00:00Z') TO ('{day + timedelta(days=1)} 00:00Z')"
    )
    times = {"created_at": at.isoformat(), "finished_at": (at + timedelta(seconds=2)).isoformat()}
    change = {"id": str(made), "request_id": str(made), "submitted_at": at.isoformat(), **times}
    for table, key in (("requests", "id"), ("audit", "request_id")):
        columns = await database.fetchval(
            "SELECT string_agg(quote_ident(column_name), ', ') FROM information_schema.columns"
            " WHERE table_name = $1 AND is_generated = 'NEVER' AND table_schema = 'public'",
            table,
        )
        await database.execute(
            f"INSERT INTO {table} ({columns}) SELECT {columns} FROM (SELECT"
            f" (jsonb_populate_record(old, $2::jsonb)).* FROM {table} AS old"
            f" WHERE {key} = $1::uuid LIMIT 1) AS made",
            request_id,
            orjson.dumps(change).decode(),
        )
    return str(made)
