"""A document as a person reads it: each block is typed beside a running deployment, in order.

Shell lines are run as they stand, strictly: a command that fails, fails the story, unless the
answer that follows is a problem. A program is run in this process. What follows a block as `json`,
`http` or `text` is what it answers: numbers, times and ids differ, the shape may not.

Only host and port, the ids of things (`<request_id>`) and paths of files differ from the document.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import re
import subprocess
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from tests.markdown import ROOT, Block
from tests.product import Product, environment
from tests.shapes import differences, lines_that_differ, streamed
from tests.typed import commands

STRICT = 'set -e\ncurl() { command curl -sS --fail-with-body -w "\\n" "$@"; }\n'
REFUSED_BY_CURL = 22
_NAME = re.compile(r"<([a-z_]+)>|\b(REQUEST_ID)\b")
SETTLED_WITHIN_S = 20.0
_CHANGES = re.compile(r" -(?:X|d|F)\b| (?:set|pause|resume|create|revoke|remove|erase|migrate)\b")
_PDF = b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer\n<< /Root 1 0 R >>\n%%EOF\n"


@dataclass
class Story:
    """`said` is all that was answered so far, `answer` what the last block did."""

    product: Product
    folder: Path
    redis_url: str
    pool: str
    said: str = ""
    answer: str = ""
    last: Block | None = None

    def run(self, block: Block, shown: Block | None) -> None:
        """Run a block of `sh` or `python`; `shown` is the answer that follows it, if one does."""
        if block.language == "python":
            self.answer = self._program(block.text)
            self.said += self.answer
        else:
            refused = shown is not None and is_refusal(shown)
            self.type(block.text, refused=refused)
        self.last = block

    def check(self, shown: Block) -> None:
        """That the last block answers in the shape that is shown, soon where it only looks."""
        until_s = time.monotonic() + SETTLED_WITHIN_S
        while (found := compared(shown, self.answer)) and time.monotonic() < until_s:
            if self.last is None or not only_looks(self.last):
                break
            self.run(self.last, shown)
        assert found == [], f"{shown.name}: {found}\n{self.answer}"

    def type(self, lines: str, *, refused: bool = False) -> None:
        """Type shell lines; `refused` says that the last answer is a problem. Lines that only look
        are typed again where they fail: what they look for may be about to be written."""
        until_s = time.monotonic() + SETTLED_WITHIN_S
        while True:
            done = self._done(lines)
            fits = done.returncode == (REFUSED_BY_CURL if refused else 0)
            if fits or _CHANGES.search(lines) or time.monotonic() >= until_s:
                break
        assert fits, f"{done.returncode}: {done.stdout}\n{done.stderr}"
        self.answer = done.stdout
        self.said += self.answer

    def _done(self, lines: str) -> subprocess.CompletedProcess[str]:
        settings = environment(self.product.data_dir, int(self.product.place.rpartition(":")[2]))
        path = f"{commands()}:{settings['PATH']}"
        return subprocess.run(
            ["sh", "-c", STRICT + self._placed(lines)],
            cwd=self.product.data_dir.parent,
            env={**settings, "PATH": path, "BASE_URL": self.product.base_url},
            input="y\n" * 5,
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )

    def _program(self, code: str) -> str:
        for written, real in (
            ("localhost:8000", self.product.place),
            ("redis://localhost:6379", self.redis_url),
            ("redis://localhost", self.redis_url),
            ('pool="gemini"', f'pool="{self.pool}"'),
        ):
            code = code.replace(written, real)
        compiled = compile(code, "a program", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        said = StringIO()
        with redirect_stdout(said):
            made = eval(compiled, {"__name__": "__main__"})
            if inspect.iscoroutine(made):
                asyncio.run(made)
        return said.getvalue()

    def _placed(self, lines: str) -> str:
        document = self.folder / "document.pdf"
        document.write_bytes(_PDF)
        for written, real in (
            ("localhost:8000", self.product.place),
            (".venv/bin/", ""),
            ("/path/to/document.pdf", str(document)),
            ("scripts/", f"{ROOT}{os.sep}scripts{os.sep}"),
        ):
            lines = lines.replace(written, real)
        return _NAME.sub(lambda found: self._named(found[1] or found[2].lower()), lines)

    def _named(self, name: str) -> str:
        """The last thing of that name that anything answered with."""
        given = re.findall(rf'"{name}": ?"([^"]+)"', self.said)
        assert given, f"nothing has answered with a {name} before"
        return str(given[-1])


def only_looks(block: Block) -> bool:
    """Whether it may be typed again, as a reader does until what was asked for has happened."""
    return block.language == "sh" and not _CHANGES.search(block.text)


def is_refusal(shown: Block) -> bool:
    if shown.language == "http":
        return bool(re.match(r"HTTP/1.1 [45]", shown.text))
    if shown.language == "json":
        written = json.loads(shown.text)
        return isinstance(written, dict) and "urn:tidegate:problem" in str(written.get("type"))
    return False


def compared(shown: Block, answer: str) -> list[str]:
    """How an answer differs from what is shown. Of several JSON answers, the one that fits best."""
    match shown.language:
        case "json":
            return _json(json.loads(shown.text), answer)
        case "http":
            return _http(shown.text, answer)
        case "text" if shown.text.startswith("event: "):
            return differences(streamed(shown.text), streamed(answer))
        case _:
            return lines_that_differ(shown.text, answer)


def _json(written: Any, answer: str) -> list[str]:
    found: list[list[str]] = []
    for line in answer.splitlines():
        if line[:1] in ("{", "["):
            found.append(differences(written, json.loads(line)))
    return min(found, key=len) if found else ["no JSON was answered"]


def _http(written: str, answer: str) -> list[str]:
    head, _, body = written.partition("\n\n")
    last = answer[answer.rindex("HTTP/1.1 ") :].replace("\r\n", "\n")
    told_head, _, told_body = last.partition("\n\n")
    status, *fields = head.splitlines()
    told_status, *told_fields = told_head.splitlines()
    named = {line.partition(":")[0].lower() for line in told_fields}
    found = [] if status == told_status else [f"{told_status}, and not {status}"]
    found += [
        f"no header {name}"
        for name in (line.partition(":")[0].lower() for line in fields)
        if name not in named
    ]
    return found + (_json(json.loads(body), told_body) if body.strip() else [])
