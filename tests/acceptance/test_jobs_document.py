"""The curl lines of docs/jobs.md, typed into a shell as they stand.

Only host and port, the request's id and the receiver of a webhook differ.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.product import Product

pytest_plugins = ["tests.product"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "jobs.md"


def line_with(words: str) -> str:
    """The one shell block of the document that has these words in it."""
    blocks = re.findall(r"^```sh\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if words in block]
    return str(found)


def shell(line: str, product: Product, request_id: str = "") -> tuple[str, str, str]:
    """Status, headers and body of what a line gets; `-i` only makes curl show the first two."""
    line = line.replace("localhost:8000", product.place).replace("<request_id>", request_id)
    line = line.replace("https://example.com/", "https://nowhere.invalid/")
    assert "<" not in line
    done = subprocess.run(
        ["sh", "-c", line.replace("curl ", "curl -sS -i ", 1)],
        cwd=product.data_dir.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    head, _, body = done.stdout.replace("\r\n", "\n").partition("\n\n")
    return head.split()[1], head.lower(), body


def json_of(line: str, product: Product, request_id: str = "") -> tuple[str, dict[str, Any]]:
    status, _, body = shell(line, product, request_id)
    return status, json.loads(body)


def test_a_job_is_handed_in_once_followed_and_listed(product: Product) -> None:
    once = line_with("Idempotency-Key")
    status, head, body = shell(once, product)
    assert (status, "idempotency-replayed" in head) == ("202", False)
    request_id = json.loads(body)["request_id"]
    status, head, body = shell(once, product)
    assert (status, "idempotency-replayed: true" in head) == ("202", True)
    assert json.loads(body)["request_id"] == request_id
    status, head, body = shell(line_with("text/event-stream"), product, request_id)
    assert (status, "content-type: text/event-stream" in head) == ("200", True)
    assert '"status":"succeeded"' in body
    assert "event: done" in body
    status, page = json_of(line_with("/requests?status"), product)
    assert (status, type(page["items"])) == ("200", list)
    succeeded = line_with("/requests?status").replace("failed", "succeeded")
    _, page = json_of(succeeded, product)
    assert request_id in [item["request_id"] for item in page["items"]]
    status, problem = json_of(line_with("-X DELETE"), product, request_id)
    assert (status, problem["code"]) == ("409", "already_ended")


def test_a_webhook_is_refused_where_there_is_no_secret_to_sign_it_with(product: Product) -> None:
    status, problem = json_of(line_with('"webhook_url"'), product)
    assert (status, problem["field"]) == ("400", "webhook_url")


def test_the_line_that_makes_a_secret_makes_a_sound_one(tmp_path: Path) -> None:
    from tidegate.settings import load

    subprocess.run(["sh", "-c", line_with("WEBHOOK_SECRET=")], cwd=tmp_path, check=True, timeout=10)
    config = load({}, tmp_path / ".env")
    assert config.webhook_secret is not None


def test_a_job_wraps_a_native_call(product: Product) -> None:
    status, accepted = json_of(line_with('"endpoint"'), product)
    assert (status, accepted["classified_by"]) == ("202", "body")
    follow = line_with("text/event-stream")
    _, _, events = shell(follow, product, accepted["request_id"])
    assert '"choices":' in events
