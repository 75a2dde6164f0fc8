"""`pip install tidegate`: the limiter alone, with its client and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from uuid import uuid4

from tests.integration.packaging.conftest import ROOT, Installed, done, run

CLIENT = {"redis", "hiredis", "msgpack"}
# redis asks for it on old patch releases of Python 3.11.
OF_THE_CLIENT = {"async-timeout"}
FOREIGN = {
    *("fastapi", "starlette", "uvicorn", "aiohttp", "httpx", "httpx2", "google", "pydantic"),
    *("asyncpg", "structlog", "typer", "rich", "orjson", "obstore"),
}

ADMIT = """
import asyncio, sys
from tidegate.limiter import Limiter, PoolPolicy

async def main():
    policy = PoolPolicy({"kind:text_only": 1}, lease_ms=600)
    async with Limiter.from_url(sys.argv[1], pool=sys.argv[2], policy=policy) as limiter:
        for _ in range(2):
            async with limiter.acquire("kind:text_only", deadline_ms=10_000) as permit:
                print("admitted", permit.fence > (0, 0))

asyncio.run(main())
print("foreign", sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[3:])))
"""


def test_it_brings_the_limiters_client_and_nothing_else(installed: Installed) -> None:
    assert installed.packages() == {"tidegate", *installed.locked}
    assert CLIENT <= installed.locked <= CLIENT | OF_THE_CLIENT


def test_it_lets_in_and_takes_back(installed: Installed, valkey_url: str, tmp_path: Path) -> None:
    pool = f"t{uuid4().hex[:12]}"
    printed = done(installed.python, "-I", "-c", ADMIT, valkey_url, pool, *FOREIGN, cwd=tmp_path)
    assert printed.splitlines() == ["admitted True", "admitted True", "foreign []"]


def test_the_limiter_imports_nothing_of_the_service_where_all_of_it_is_installed(
    valkey_url: str, tmp_path: Path
) -> None:
    pool = f"t{uuid4().hex[:12]}"
    printed = done(sys.executable, "-c", ADMIT, valkey_url, pool, *FOREIGN, cwd=tmp_path)
    assert printed.splitlines()[-1] == "foreign []"


def test_the_command_says_in_one_line_what_to_install(installed: Installed, tmp_path: Path) -> None:
    for command in ([installed.command], [installed.python, "-I", "-m", "tidegate"]):
        finished = run(*command, "up", cwd=tmp_path)
        assert (finished.returncode, finished.stdout) == (1, "")
        assert finished.stderr.startswith("tidegate: typer is not installed")
        assert "pip install 'tidegate[gateway]'" in finished.stderr
        assert finished.stderr.count("\n") == 1


def test_the_service_is_an_extra_and_all_is_all_of_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (whole,) = extras["all"]
    named = whole.removeprefix("tidegate[").removesuffix("]").split(",")
    assert sorted(named) == sorted(set(extras) - {"all", "export"})


def test_requirements_txt_holds_all_that_the_lock_names_for_the_whole_product() -> None:
    exported = done(
        *(Path(sys.executable).with_name("uv"), "export", "--quiet", "--frozen"),
        *("--all-extras", "--no-extra", "export", "--no-dev", "--no-hashes", "--no-header"),
    )
    assert (ROOT / "requirements.txt").read_text() == exported


def test_a_fault_of_our_own_is_not_taken_for_a_missing_package(tmp_path: Path) -> None:
    program = (
        "import sys, tidegate.__main__\n"
        "sys.modules['tidegate.cli'] = None\n"
        "tidegate.__main__.main()"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert "ModuleNotFoundError" in finished.stderr
