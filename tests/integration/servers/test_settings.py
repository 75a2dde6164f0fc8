"""The settings of servers that docs/servers.md recommends are settings of theirs."""

from __future__ import annotations

from pathlib import Path

from redis import Redis

from tests.integration.servers.sentinels import SERVICE
from tests.markdown import blocks

SENTINELS = Path(__file__).with_name("sentinels.py")


def test_each_setting_is_known_to_the_server_or_used_for_its_sentinels(valkey_url: str) -> None:
    (shown,) = [
        block.text for block in blocks("docs/servers.md") if "min-replicas-to-write 1" in block.text
    ]
    used = SENTINELS.read_text(encoding="utf-8")
    with Redis.from_url(valkey_url) as server:
        for line in shown.splitlines():
            name, *rest = line.split()
            if name == "sentinel":
                assert f"sentinel {rest[0]} {{SERVICE}}" in used, f"{line}, beside {SERVICE}"
            else:
                assert list(server.config_get(name)) == [name], line
