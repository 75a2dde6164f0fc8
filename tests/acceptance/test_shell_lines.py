"""The shell lines of documents on tenants, costs and the gateway, and the programs of the last one.

They run as they stand, beside a deployment: only host, port and the ids of things differ. Every
command must succeed; curl fails where the status says so.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.product import environment

if TYPE_CHECKING:
    from tests.product import Product

pytest_plugins = ["tests.product"]

DOCS = Path(__file__).parents[2] / "docs"
STRICT = 'set -e\ncurl() { command curl -sS --fail-with-body -w "\\n" "$@"; }\n'


def blocks(document: str, language: str = "sh") -> list[str]:
    text = (DOCS / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def block_with(document: str, words: str) -> str:
    """The one shell block of the document that has these words in it."""
    (found,) = [block for block in blocks(document) if words in block]
    return found


def shell(lines: str, product: Product, **named: str) -> str:
    """What the lines print; `named` are put in for `<name>`. Questions are answered with yes."""
    for name, value in named.items():
        assert f"<{name}>" in lines
        lines = lines.replace(f"<{name}>", value)
    lines = lines.replace("localhost:8000", product.place)
    assert not re.search(r"<\w+>", lines)
    settings = environment(product.data_dir, int(product.place.rpartition(":")[2]))
    commands = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["sh", "-c", STRICT + lines],
        cwd=product.data_dir.parent,
        env={**settings, "PATH": f"{commands}:{settings['PATH']}"},
        input="y\n" * 5,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def key_prefix(product: Product, tenant: str) -> str:
    key = shell(f"tidegate tenants set {tenant}\ntidegate keys create --tenant {tenant}", product)
    return key.split("tg_")[-1].split("_")[0]


def test_every_block_is_run_by_a_test_below() -> None:
    run = {"accounting.md": 4, "tenants.md": 4, "gateway.md": 1}
    assert {document: len(blocks(document)) for document in run} == run
    assert len(blocks("gateway.md", "python")) == 2


def test_totals_are_told(product: Product) -> None:
    said = shell(block_with("accounting.md", "/admin/usage"), product)
    found = [json.loads(line) for line in said.splitlines() if line]
    assert [set(one) for one in found] == [{"since", "until", "rows", "total", "cut"}] * 3


@pytest.mark.parametrize("words", ["--month-money", "--retention-days"])
def test_budgets_and_retention_are_set(product: Product, words: str) -> None:
    assert "acme" in shell(block_with("accounting.md", words), product)


def test_what_is_about_a_subject_is_erased(product: Product) -> None:
    shell("tidegate tenants set acme", product)
    said = shell(block_with("accounting.md", "tidegate erase"), product)
    assert '"status":"queued"' in said.replace(" ", "")


def test_keys_are_made_listed_and_revoked(product: Product) -> None:
    prefix = key_prefix(product, "acme")
    said = shell(block_with("tenants.md", "tidegate keys revoke"), product, prefix=prefix)
    assert len(re.findall(r"^tg_\w+_\w+$", said, re.MULTILINE)) == 3
    assert "operator" in said


def test_a_tenant_is_made_changed_and_removed(product: Product) -> None:
    said = shell(block_with("tenants.md", "--priority-cap"), product)
    assert "rpm:tenant/acme" in said


def test_the_same_goes_over_http(product: Product) -> None:
    prefix = key_prefix(product, "acme")
    said = shell(block_with("tenants.md", "-X PUT"), product, prefix=prefix)
    assert '"tg_' in said


def test_from_nothing_to_a_key(product: Product) -> None:
    said = shell(block_with("tenants.md", "tidegate migrate"), product)
    assert '"request_id"' in said


def test_bodies_are_given_back(product: Product) -> None:
    body = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hello"}]}
    head = shell(
        "curl -D - localhost:8000/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'",
        product,
    )
    (request_id,) = re.findall(r"x-tidegate-request-id: (\S+)", head)
    # The record is written behind the answer.
    waited = "--retry 20 --retry-delay 1 --retry-all-errors "
    lines = block_with("gateway.md", "<request_id>").replace("curl ", f"curl {waited}")
    said = shell(lines, product, request_id=request_id)
    assert json.dumps(body) in said
    assert '"choices"' in said


@pytest.mark.parametrize("words", ["from openai", "from google"])
def test_the_programs_of_the_gateway_run(product: Product, words: str) -> None:
    (program,) = [one for one in blocks("gateway.md", "python") if words in one]
    done = subprocess.run(
        [sys.executable, "-c", program.replace("localhost:8000", product.place)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
