"""The start-up page of `tidegate up`: what it says of the limits."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway, open_gateway
from tests.waiting import wait_until
from tidegate.embedded.servers import free_port
from tidegate.http.browsers import checked
from tidegate.operator_key import key_file
from tidegate.policy.deployment import deployed
from tidegate.policy.format import edit
from tidegate.settings import Config
from tidegate.supervisor.services import Ground
from tidegate.supervisor.up import Page, bounds_in_force, make_demo_key

__all__ = ["open_gateway"]


async def at_once(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """What the page says of limits."""
    assert config.redis_url is not None
    policy = deployed(config)
    in_force = await bounds_in_force(config.redis_url.get_secret_value(), policy, within_s=0.5)
    capsys.readouterr()
    ground = Ground(config, None, embedded=False, emulated=False)
    Page(config, 1, 1).ready(ground, "http://localhost:1", policy, in_force)
    after = capsys.readouterr().out.partition("Limits ")[2]
    return " ".join(after.partition("\n\n")[0].split())


async def changed(gateway: Gateway, **limits: int) -> None:
    wanted: dict[str, Any] = {f"kind:{kind}": bound for kind, bound in limits.items()}
    now = await gateway.services.keeper.change(edit(wanted), set_by="ann")

    async def in_force() -> bool:
        return (await gateway.services.limiter.snapshot()).revision == now.number

    await wait_until(in_force, 20, "the new limits")


async def test_the_page_tells_the_limits_in_force_and_which_were_set_live(
    open_gateway: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = await open_gateway(worker=False)
    assert await at_once(gateway.config, capsys) == (
        "text_only 5, multi_modal 3, image_generation 2 concurrent calls, over all processes"
    )
    await changed(gateway, text_only=8)
    assert await at_once(gateway.config, capsys) == (
        "text_only 8 (configured: 5), multi_modal 3, image_generation 2 concurrent calls, over all "
        "processes tidegate limits history says who set them, and why"
    )
    dead = {"redis_url": type(gateway.config.redis_url)(f"redis://127.0.0.1:{free_port()}")}
    assert await at_once(gateway.config.model_copy(update=dead), capsys) == (
        "text_only 5, multi_modal 3, image_generation 2 concurrent calls, over all processes "
        "as configured: Valkey does not answer yet"
    )


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "log"])
async def test_the_page_tells_an_address_of_the_dashboard_that_signs_in_and_no_key(
    open_gateway: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
) -> None:
    gateway = await open_gateway(worker=False)
    key, file = gateway.operator_key, gateway.config.data_dir / "sign-in.url"
    file.write_text("of an earlier start")
    file.chmod(0o644)
    ground = Ground(gateway.config, None, embedded=False, emulated=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    Page(gateway.config, 1, 1).ready(ground, gateway.url, deployed(gateway.config), None)
    said = capsys.readouterr().out
    assert key not in said
    address = re.compile(rf"{gateway.url}/dashboard/\?code=([\w=-]+)")
    if is_terminal:
        (code,) = address.findall(said)
    else:
        assert "code=" not in said, "others may read the log"
        assert str(file) in said
        assert file.stat().st_mode & 0o777 == 0o600
        (code,) = address.findall(file.read_text())
    assert checked("code", key, code) is not None
    assert str(key_file(gateway.config)) in said


async def test_where_the_address_cannot_be_written_the_page_tells_of_the_key(
    open_gateway: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = await open_gateway(worker=False)
    (gateway.config.data_dir / "sign-in.url").mkdir()
    ground = Ground(gateway.config, None, embedded=False, emulated=False)
    Page(gateway.config, 1, 1).ready(ground, gateway.url, deployed(gateway.config), None)
    said = capsys.readouterr().out
    assert f"Dashboard   live         {gateway.url}/dashboard\n" in said
    assert "sign-in.url" not in said
    assert str(key_file(gateway.config)) in said


def test_the_page_names_the_upstreams_and_tries_none_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = {"database_url": "postgresql://db/x", "redis_url": "redis://valkey"}
    keys = {"openai_api_key": "k", "anthropic_api_key": "k"}
    config = Config.model_validate({"host": "0.0.0.0", "data_dir": tmp_path, **stores, **keys})
    ground = Ground(config, None, embedded=False, emulated=False)
    Page(config, 1, 1).ready(ground, "http://localhost:1", deployed(config), None)
    said = capsys.readouterr().out
    assert (
        "Upstreams   openai       https://api.openai.com/v1 for gpt-*, chatgpt-*, o1*, ...\n"
        in said
    )
    assert " anthropic    https://api.anthropic.com for claude-*\n" in said
    assert "/submit -H" in said  # prompts reach them
    calls = [line.strip() for line in said.splitlines() if line.strip().startswith("curl")]
    assert calls[0].startswith("curl localhost:1/v1/chat/completions "), "an SDK's call first"
    assert '"model": "gpt-' in calls[0]
    assert "Limits " not in said, "what bounds prompts"


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "log"])
async def test_a_demonstration_whose_callers_show_a_key_makes_one_at_its_first_start(
    open_gateway: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
) -> None:
    """As in a container, which listens on all addresses. A log never contains the key."""
    gateway = await open_gateway(worker=False, auth="on")
    assert await asyncio.to_thread(make_demo_key, gateway.config) is None, "no demonstration"
    config = gateway.config.model_copy(update={"tidegate_demo": True})
    page, file = Page(config, 1, 1), config.data_dir / "demonstration.key"
    page.demo_key = made = await asyncio.to_thread(make_demo_key, config)
    ground = Ground(config, None, embedded=False, emulated=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    page.ready(ground, gateway.url, deployed(config), None)
    said = capsys.readouterr().out
    shown = set(re.findall(r'-H "x-api-key: (\S+)"', said))
    assert made is not None
    if is_terminal:
        assert shown == {made}
    else:
        assert shown == {"<key>"}
        assert made not in said, "others may read the log"
        assert str(file) in said
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.read_text() == f"{made}\n"
    statuses = []
    for key in (made, "tg_wrong"):
        headers = {"x-api-key": key}
        async with gateway.http.get(f"{gateway.url}/v1/models", headers=headers) as answer:
            statuses.append(answer.status)
    assert statuses == [200, 401]
    assert await asyncio.to_thread(make_demo_key, config) is None, "there is one"
