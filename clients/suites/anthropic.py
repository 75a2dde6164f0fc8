"""Suite of anthropic-sdk-python: its own tests of what Tidegate knows, and a mock of its types.

Its source distribution has the tests. There is no public specification: the mock is made from the
types of the SDK, `anthropic_mock.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.environments import python_with
from clients.suites.runs import PYTEST, Suite, policy_of, served, sources_of
from tidegate.embedded.servers import free_port

VERSION = "2.13.0"
_PYTHON = (
    f"anthropic[aiohttp]=={VERSION}",
    *PYTEST,
    *("respx==0.23.1", "http-snapshot[httpx]==0.1.9", "inline-snapshot>=0.28", "rich"),
    "standardwebhooks",
)
# What Tidegate does not know by itself, and relays where an operator names it: the same list is in
# docs/gateway.md.
PASSTHROUGH = (
    *("/v1/skills/*", "/v1/user_profiles/*", "/v1/agents/*", "/v1/sessions/*"),
    *("/v1/environments/*", "/v1/memory_stores/*", "/v1/vaults/*", "/v1/tunnels/*"),
    *("/v1/deployments/*", "/v1/deployment_runs/*", "/v1/dreams/*"),
)


def suite_of(sdk: Path | None, _spec: Path | None, folder: Path) -> Suite:
    """sdk: a folder of the SDK's repository in the place of what is downloaded; folder: for logs.
    Raises EnvironmentMissing."""
    python = python_with("suite-anthropic", _PYTHON, compiled=False)
    sources = sdk or sources_of("anthropic", VERSION)
    path = f"PYTHONPATH={sources / 'src'}"
    return Suite(
        name="anthropic-sdk-python",
        version=VERSION if sdk is None else f"of {sdk.name}",
        folder=sources,
        python=python,
        tests=("tests/api_resources",),
        url_variable="TEST_API_BASE_URL",
        mock=partial(_mock, ["env", path, str(python), "-P"], folder / "mock.log"),
        policy=partial(policy_of, "anthropic", PASSTHROUGH),
        ignored=tuple(
            f"tests/api_resources/{below}{one}"
            for below in ("", "beta/")
            for one in ("organization", "test_organization.py")
        ),
        least=3_500,
        environment=dict([path.split("=", 1)]),
    )


@contextmanager
def _mock(python: list[str], log: Path) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    program = Path(__file__).with_name("anthropic_mock.py")
    with served([*python, str(program), str(port)], f"{url}/health", log):
        yield url
