"""Shell lines of the documents on tenants, costs, commands and the gateway that need a test of
their own.

They run as they stand, beside a deployment: only host, port and the ids of things differ. Every
command must succeed; curl fails where the status says so.
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.markdown import blocks
from tests.product import environment
from tests.story import STRICT
from tests.typed import commands

if TYPE_CHECKING:
    from tests.product import Product

pytest_plugins = ["tests.product"]


def block_with(document: str, words: str) -> str:
    """The one shell block of the document that has these words in it."""
    (found,) = [
        block.text
        for block in blocks(f"docs/{document}")
        if block.language == "sh" and words in block.text
    ]
    return found


def shell(lines: str, product: Product, **named: str) -> str:
    """What the lines print; `named` are put in for `<name>`. Questions are answered with yes."""
    for name, value in named.items():
        assert f"<{name}>" in lines
        lines = lines.replace(f"<{name}>", value)
    lines = lines.replace("localhost:8000", product.place)
    assert not re.search(r"<\w+>", lines)
    settings = environment(product.data_dir, int(product.place.rpartition(":")[2]))
    done = subprocess.run(
        ["sh", "-c", STRICT + lines],
        cwd=product.data_dir.parent,
        env={**settings, "PATH": f"{commands()}:{settings['PATH']}"},
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


@pytest.mark.parametrize("words", ["--month-money", "--retention-days"])
def test_budgets_and_retention_are_set(product: Product, words: str) -> None:
    assert "acme" in shell(block_with("accounting.md", words), product)


def test_budgets_are_set_listed_resumed_and_removed(product: Product) -> None:
    # `all` would bind the calls of the other tests.
    undone = "".join(f"\ntidegate budgets remove {name} --yes" for name in ("all", "people"))
    # accounting.md has one of that name too, of another zone, which can't be changed.
    before = "tidegate budgets remove opus --yes || true\n"
    said = shell(before + block_with("money.md", "tidegate budgets set") + undone, product)
    assert "opus is set: $20.00 a day of Europe/Berlin for model claude-opus-*, each tenant" in said
    assert "people is set: $2.00 in 5 h for tenant acme, each subject" in said
    assert "all is removed" in said


def test_each_session_of_an_agent_has_a_budget(product: Product) -> None:
    lines = block_with("agents/README.md", "tidegate budgets set")
    said = shell(f"{lines}tidegate budgets remove session --yes\n", product)
    assert "session is set: $5.00 in 1 d for each tenant, each conversation" in said


def test_what_is_about_a_subject_is_erased(product: Product) -> None:
    shell("tidegate tenants set acme", product)
    said = shell(block_with("accounting.md", "tidegate erase"), product)
    assert '"status":"queued"' in said.replace(" ", "")


def test_the_record_is_exported(product: Product) -> None:
    """Its record began today, so that no day is over: `tests/integration/store` has such days."""
    said = shell(block_with("operating.md", "tidegate export record"), product)
    assert said.splitlines() == ["no day is to be exported"] * 3


def test_the_operators_key_opens_admin(product: Product) -> None:
    assert '"kind:text_only"' in shell(block_with("limits.md", "operator.key"), product)


def test_keys_are_made_listed_and_revoked(product: Product) -> None:
    prefix = key_prefix(product, "acme")
    said = shell(block_with("tenants.md", "tidegate keys revoke"), product, prefix=prefix)
    assert len(re.findall(r"^tg_\w+_\w+$", said, re.MULTILINE)) == 3
    assert "operator" in said


def test_keys_are_made_with_a_role(product: Product) -> None:
    said = shell(block_with("access.md", "--role viewer"), product)
    assert len(re.findall(r"^tg_\w+_\w+$", said, re.MULTILINE)) == 2


def test_an_operator_calls_a_model_as_a_tenant(product: Product) -> None:
    said = shell(block_with("access.md", "/admin/calls/"), product)
    assert '"choices"' in said


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


def test_a_client_asks_waits_follows_and_lists(product: Product) -> None:
    said = shell(block_with("cli.md", "tidegate submit"), product)
    assert "Explain the tide" in said
    assert "emulated picture" in said
    assert len(list((product.data_dir.parent / "pictures").glob("*.png"))) == 1


def test_a_file_of_prompts_is_worked_through(product: Product) -> None:
    said = shell(block_with("cli.md", "tidegate batch run"), product)
    assert '"succeeded": 20' in said
    assert '"earlier": 20' in said


def test_a_sound_deployment_is_well(product: Product) -> None:
    said = shell(block_with("cli.md", "tidegate doctor"), product)
    assert '"failed": 0' in said
    assert "The settings are sound." in said
