"""The documents' shell lines, programs and answers, as `tests/documents.py` says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen
from uuid import uuid4

import pytest

from tests.documents import STORIES, told
from tests.markdown import text_of
from tests.story import Story

if TYPE_CHECKING:
    from tests.markdown import Block
    from tests.product import Product

pytest_plugins = ["tests.product"]

ANSWERS = ("json", "http", "text")


@pytest.fixture
def story(product: Product, tmp_path: Path, valkey_url: str) -> Story:
    return Story(product, tmp_path, valkey_url, f"t{uuid4().hex[:12]}")


@pytest.mark.parametrize("document", STORIES)
def test_every_block_does_what_is_written(document: str, story: Story) -> None:
    run = told(document)
    assert run, f"{document} has nothing to run: it is no story"
    before_it = BEFORE.get(document)
    if before_it is not None:
        story.type(before_it)
    for block, after in zip(run, [*run[1:], None], strict=True):
        if block.language in ANSWERS:
            story.check(block)
        else:
            story.run(block, after if after and after.language in ANSWERS else None)
    if changes_limits(run):
        story.type("tidegate limits set --deployed --reason 'the story is told'")


def test_http_api_md_names_every_operation(product: Product) -> None:
    with urlopen(f"{product.base_url}/openapi.json") as answer:
        described = json.load(answer)["paths"]
    text = text_of("docs/http-api.md")
    lost = [
        f"{method.upper()} {path}"
        for path, methods in described.items()
        for method in methods
        if f"`{method.upper()} {path}`" not in text
    ]
    assert lost == []


def changes_limits(run: list[Block]) -> bool:
    changes = re.compile(
        r"tidegate limits (set|pause)|/admin/limits|tidegate tenants|/admin/tenants"
    )
    return any(changes.search(block.text) for block in run)


# What a document takes for granted. Where a story before has taken limits of acme's away, a call of
# acme's is refused until the API process has heard of it; for good under a budget that one has set.
_CALL_OF_ACME = """\
curl -X DELETE localhost:8000/admin/budgets/acme-day \\
    -H "Authorization: Bearer $(cat data/operator.key)" || :
until curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -H 'x-tidegate-tenant: acme' \\
    -d '{"model": "m", "messages": [{"role": "user", "content": "Say hello"}]}'; do :; done
until curl 'localhost:8000/admin/usage?tenant=acme' \\
    -H "Authorization: Bearer $(cat data/operator.key)" | grep -q '"model"'; do :; done
"""
BEFORE = {"docs/accounting.md": _CALL_OF_ACME}
