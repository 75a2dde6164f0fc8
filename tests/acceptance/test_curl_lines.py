"""The five curl lines that the product is known by, typed into a shell as they stand.

Only host and port, the file's path and the request's id differ.
"""

from __future__ import annotations

import json
import subprocess
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

if TYPE_CHECKING:
    from tests.product import Product

pytest_plugins = ["tests.product"]

TEXT = (
    'curl -X POST localhost:8000/submit -H "Content-Type: application/json" '
    """-d '{"data": "Explain the importance of cybersecurity in modern businesses."}'"""
)
DOCUMENT = (
    'curl -X POST localhost:8000/submit -H "Content-Type: multipart/form-data" '
    '-F "data=Describe this document in detail" -F "file=@/path/to/document.pdf"'
)
PICTURE = (
    'curl -X POST localhost:8000/submit -H "Content-Type: application/json" '
    """-d '{"data": "Generate an image of a futuristic city with flying cars."}'"""
)
STREAM = (
    'curl -N localhost:8000/llm/stream -H "Content-Type: multipart/form-data" '
    """-F 'text="What is modern family?"'"""
)
STATUS = "curl -N localhost:8000/llm/status/<request_id>"


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A PDF of one page that says hello, with a correct table of its objects."""
    text = zlib.compress(b"BT /F1 24 Tf 72 720 Td (Hello from a document) Tj ET")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%b\nendstream" % (len(text), text),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body = b"%PDF-1.4\n"
    table = b"0000000000 65535 f \n"
    for number, content in enumerate(objects, start=1):
        table += b"%010d 00000 n \n" % len(body)
        body += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    size = len(objects) + 1
    end = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(body))
    path = tmp_path / "document.pdf"
    path.write_bytes(body + b"xref\n0 %d\n" % size + table + end)
    return path


def shell(line: str, product: Product, *, replaced: dict[str, str] | None = None) -> str:
    """What a line prints; `-s -w` only make curl silent and show the status below."""
    for old, new in {"localhost:8000": product.place, **(replaced or {})}.items():
        assert old in line
        line = line.replace(old, new)
    done = subprocess.run(
        ["sh", "-c", line.replace("curl ", r"curl -sS -w '\n%{http_code} %{content_type}' ", 1)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def submitted(answer: str) -> dict[str, Any]:
    body, _, head = answer.rpartition("\n")
    assert head == "202 application/json", answer
    accepted: dict[str, Any] = json.loads(body)
    assert UUID(accepted["request_id"]).version == 7
    assert accepted["status"] == "queued"
    assert accepted["status_url"].endswith(f"/status/{accepted['request_id']}")
    return accepted


def followed(request_id: str, product: Product) -> dict[str, Any]:
    """The record at its end: asked for at once as the line stands, then with ?wait=20."""
    found = shell(STATUS, product, replaced={"<request_id>": request_id})
    for _ in range(3):
        body, _, head = found.rpartition("\n")
        assert head == "200 application/json", found
        record: dict[str, Any] = json.loads(body)
        assert record["request_id"] == request_id
        if record["status"] not in ("queued", "running"):
            return record
        found = shell(STATUS, product, replaced={"<request_id>": f"{request_id}?wait=20"})
    raise AssertionError(f"not at its end: {record}")


def test_a_text_is_taken_and_answered(product: Product) -> None:
    accepted = submitted(shell(TEXT, product))
    assert accepted["type"] == "text_only"
    assert accepted["classified_by"] in ("rules", "llm", "keywords")
    record = followed(accepted["request_id"], product)
    assert record["status"] == "succeeded"
    assert record["type"] == "text_only"
    assert record["text"]
    assert record["attempts"] == 1
    assert record["usage"]["output_tokens"] > 0
    assert record["submitted_at"] <= record["admitted_at"] <= record["finished_at"]
    assert record["queue_ms"] >= 0
    assert record["upstream_ms"] > 0


def test_a_document_is_taken_and_described(product: Product, document: Path) -> None:
    answer = shell(DOCUMENT, product, replaced={"/path/to/document.pdf": str(document)})
    accepted = submitted(answer)
    assert accepted["type"] == "multi_modal"
    record = followed(accepted["request_id"], product)
    assert record["status"] == "succeeded"
    assert record["text"]
    (upload,) = record["files"]
    assert upload["name"] == "document.pdf"
    assert upload["mime_type"] == "application/pdf"
    assert upload["size_bytes"] == document.stat().st_size


def test_a_picture_is_made_and_can_be_fetched(product: Product, tmp_path: Path) -> None:
    accepted = submitted(shell(PICTURE, product))
    assert accepted["type"] == "image_generation"
    record = followed(accepted["request_id"], product)
    assert record["status"] == "succeeded"
    (image,) = record["images"]
    assert image["mime_type"] == "image/png"
    path = tmp_path / "picture.png"
    assert image["url"].startswith("/llm/files/"), "on this server, under the prefix in use"
    head = shell(f"curl -o {path} localhost:8000{image['url']}", product)
    assert head.strip() == "200 image/png"
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert len(picture) == image["size_bytes"]


def test_a_stream_gives_the_answer_bit_by_bit_and_says_when_it_is_done(product: Product) -> None:
    body, _, head = shell(STREAM, product).rpartition("\n")
    assert head.lower().replace(" ", "").startswith("200text/event-stream"), head
    events = []
    for block in body.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[0] != ":")
        events.append((fields["event"], json.loads(fields["data"])))
    names = [name for name, _ in events]
    assert names[-1] == "done"
    assert names.count("done") == 1
    assert "error" not in names
    deltas = [data["text"] for name, data in events if name == "delta"]
    assert len(deltas) > 1
    (usage,) = [data for name, data in events if name == "usage"][-1:]
    assert usage["output_tokens"] > 0
    record = followed(events[-1][1]["request_id"], product)
    assert record["status"] == "succeeded"
    assert record["type"] == "text_only"
    assert record["text"] == "".join(deltas)


def test_the_status_of_an_unknown_request_is_a_problem(product: Product) -> None:
    unknown = "019abf3e-7c1e-7b52-9f0e-0e1f5a3c2d4b"
    found = shell(STATUS, product, replaced={"<request_id>": unknown})
    body, _, head = found.rpartition("\n")
    assert head == "404 application/problem+json"
    assert json.loads(body)["status"] == 404
