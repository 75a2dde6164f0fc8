"""Suite of openai-python: its own tests, and a mock of its OpenAPI specification.

Its repository has both: the specification that the SDK is made from, and the mock that its own
tests run on, `steady`. Its source distribution has the tests alone. The mock's objects are made
today: Tidegate gives nobody a response that has no row and is older than rows become, and the
mock's own times are of 1970.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from bench.environments import CACHE, EnvironmentMissing, node_modules_with, python_with
from clients.suites.runs import PYTEST, Suite, policy_of, served, sources_of
from tidegate.embedded.servers import free_port

VERSION = "3.3.1"
SPEC_URL = (
    "https://raw.githubusercontent.com/openai/openai-python/"
    f"v{VERSION}/api_reference/openapi.transformed.yml"
)
SPEC_SHA256 = "e67a8e697896baf8771c013935bcf783a93d857ef478e91b961fae756cab075e"
_SPEC_IN_SDK = Path("api_reference/openapi.transformed.yml")
_MOCK = {"@stdy/cli": "0.22.2"}
_PYTHON = (
    f"openai[aiohttp]=={VERSION}",
    *PYTEST,
    *("inline-snapshot>=0.28", "rich", "trio", "azure-identity", "botocore==1.42.97"),
)
# As the SDK's own scripts start it.
_FORMATS = [
    f"--validator-{where}-{what}-format=brackets"
    for where in ("query", "form")
    for what in ("array", "object")
]
# What Tidegate does not know by itself, and relays where an operator names it: the same list is in
# docs/gateway.md. Realtime's lead past the limits.
PASSTHROUGH = (
    *("/v1/assistants/*", "/v1/threads/*", "/v1/vector_stores/*", "/v1/containers/*"),
    *("/v1/evals/*", "/v1/fine_tuning/*", "/v1/videos/*", "/v1/skills/*", "/v1/chatkit/*"),
    *("/v1/content_provenance_checks", "/v1/audio/voices", "/v1/audio/voice_consents/*"),
    *("/v1/realtime/calls/*", "/v1/realtime/client_secrets", "/v1/realtime/translations/*"),
)
REASONS = {
    r"test_batches\.Test(Async)?Batches\.test_method_create_with_all_params": (
        "output_expires_after: what a batch gives is kept as RETENTION_DAYS says"
    ),
    r"test_files\.Test(Async)?Files\.test_method_list_with_all_params": (
        "limit=0, which OpenAI itself refuses for files"
    ),
}


def suite_of(sdk: Path | None, spec: Path | None, folder: Path) -> Suite:
    """sdk: a folder of the SDK's repository, spec: a file of its specification, each in the place
    of what is downloaded; folder: for logs. Raises EnvironmentMissing."""
    python = python_with("suite-openai", _PYTHON, compiled=False)
    sources = sdk or sources_of("openai", VERSION)
    if spec is None and (sources / _SPEC_IN_SDK).exists():
        spec = sources / _SPEC_IN_SDK
    return Suite(
        name="openai-python",
        version=_version_in(sources),
        folder=sources,
        python=python,
        tests=("tests/api_resources",),
        url_variable="TEST_API_BASE_URL",
        mock=partial(_mock, spec or _downloaded_spec(), folder / "mock.log"),
        policy=partial(policy_of, "openai", PASSTHROUGH),
        below="/v1",
        environment={"PYTHONPATH": str(sources / "src"), "DEFER_PYDANTIC_BUILD": "false"},
        ignored=("tests/api_resources/admin",),
        reasons=REASONS,
        bar=0.98,
    )


def _version_in(sources: Path) -> str:
    found = re.search(r'__version__ = "([^"]+)"', (sources / "src/openai/_version.py").read_text())
    return "of an unknown version" if found is None else found[1]


def _downloaded_spec() -> Path:
    """The specification that this version of the SDK is made from."""
    found = CACHE / f"suite-openai-{VERSION}.yml"
    if found.exists():
        return found
    try:
        with urlopen(SPEC_URL, timeout=60) as answer:
            data = answer.read()
    except (URLError, OSError) as error:
        said = f"{SPEC_URL} can't be had ({error}): --spec names a file of it"
        raise EnvironmentMissing(said) from None
    if hashlib.sha256(data).hexdigest() != SPEC_SHA256:
        raise EnvironmentMissing(f"{SPEC_URL} is not the one that these tests are made for")
    found.write_bytes(data)
    return found


_CREATED = re.compile(
    r"^( +)created_at:\n\1  type: (?:number|integer)\n\1  format: unixtime\n", re.MULTILINE
)


def made_at(spec: str, now_s: int) -> str:
    """Return a specification whose objects are all created at `now_s`, in Unix time."""
    bounds = rf"\1  minimum: {now_s}\n\1  maximum: {now_s + 1}\n"
    return _CREATED.sub(rf"\g<0>{bounds}", spec)


@contextmanager
def _mock(spec: Path, log: Path) -> Iterator[str]:
    modules = node_modules_with("suite-openai-mock", _MOCK, {})
    served_spec = log.with_suffix(".yml")
    served_spec.write_text(made_at(spec.read_text(encoding="utf-8"), int(time.time())), "utf-8")
    port = free_port()
    command = [str(modules / ".bin" / "steady"), "--host", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with served([*command, *_FORMATS, str(served_spec)], f"{url}/_x-steady/health", log):
        yield url
