"""Azure, Vertex and Bedrock as upstreams, and their own SDKs as clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.gemini_upstream import PATIENT, Collected, call
from tests.gateway import Gateway, Opener
from tests.integration.native.clouds import (
    AWS_ID,
    AWS_SECRET,
    AWS_TOKEN,
    AZURE_KEY,
    IDENTITY_SECRET,
    PROJECT,
    Clouds,
    run_clouds,
)
from tests.waiting import wait_until
from tidegate.call import Answer
from tidegate.emulator.server import run_emulator
from tidegate.errors import UpstreamUnauthorized
from tidegate.policy.access import Authentication
from tidegate.policy.deployment import Upstream, deployed_upstreams
from tidegate.settings import Config
from tidegate.upstream.credentials import (
    CredentialsUnavailable,
    GoogleSource,
    Signers,
    open_wire,
)
from tidegate.upstream.gemini import GeminiProcessor
from tidegate.upstream.transport import RelayWire

FILE = """
[upstreams.azure]
provider = "azure"
base_url = "{url}"
paths = "deployments"
models = ["gpt-dep"]

[upstreams.entra]
provider = "azure"
base_url = "{url}"
auth = "entra"
models = ["gpt-entra"]

[upstreams.vertex]
provider = "vertex"
base_url = "{url}"
project = "proj-1"
credentials_file = "{account}"
models = ["claude-*", "gemini-v*"]

[upstreams.bedrock]
provider = "bedrock"
base_url = "{url}"
region = "us-east-1"
auth = "aws"
models = ["openai.*"]
"""
SAY: Any = [{"role": "user", "content": "Say hello"}]


@pytest.fixture
async def clouds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Clouds]:
    async with run_emulator() as emulator, run_clouds(emulator.url) as found:
        monkeypatch.setenv("AZURE_OPENAI_API_KEY", AZURE_KEY)
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"{found.url}/msi")
        monkeypatch.setenv("IDENTITY_HEADER", IDENTITY_SECRET)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", AWS_ID)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
        monkeypatch.setenv("AWS_SESSION_TOKEN", AWS_TOKEN)
        yield found


@pytest.fixture
def policy(clouds: Clouds, tmp_path: Path) -> Path:
    account = clouds.service_account(tmp_path)
    path = tmp_path / "policy.toml"
    path.write_text(FILE.format(url=clouds.url, account=account))
    return path


@pytest.fixture
async def gateway(open_gateway: Opener, policy: Path) -> Gateway:
    return await open_gateway(worker=False, tidegate_policy=policy)


async def test_openais_sdks_reach_azure_and_bedrock(gateway: Gateway, clouds: Clouds) -> None:
    from openai import AsyncAzureOpenAI, AsyncOpenAI

    async with (
        AsyncAzureOpenAI(
            azure_endpoint=gateway.url, api_version="2024-02-01", api_key="of-a-client"
        ) as azure,
        AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="of-a-client", max_retries=0) as plain,
    ):
        whole = await azure.chat.completions.create(model="gpt-dep", messages=SAY)
        assert whole.choices[0].message.content
        streamed = await plain.chat.completions.create(model="gpt-dep", messages=SAY, stream=True)
        assert [one async for one in streamed]
        vectors = await azure.embeddings.create(model="gpt-dep", input="a")
        assert vectors.data
        for model in ("gpt-entra", "openai.gpt-oss"):
            assert (await plain.chat.completions.create(model=model, messages=SAY)).choices
        assert (await azure.responses.create(model="gpt-entra", input="a")).output_text
        named = await azure.chat.completions.with_raw_response.create(
            model="gpt-dep", messages=SAY, extra_body={"model": "another"}
        )
        row = await gateway.audit(named.headers["x-tidegate-request-id"])
        assert (row["model"], row["upstream"]) == ("gpt-dep", "azure"), "the path's, not the body's"
    body = {"messages": [{"role": "user", "content": [{"text": "Say hello"}]}]}
    url = f"{gateway.url}/model/openai.gpt-oss:0/converse"
    async with gateway.http.post(url, json=body, headers={"x-amz-security-token": "t"}) as answer:
        assert (answer.status, answer.headers["x-tidegate-upstream"]) == (200, "bedrock")
    assert clouds.seen.pop()[0] == "/model/openai.gpt-oss:0/converse", "signed again"
    asked = [(path, body["model"]) for path, body in clouds.seen]
    deployment = "/openai/deployments/gpt-dep/chat/completions?api-version=2024-10-21"
    assert asked == [
        (deployment, "gpt-dep"),
        (deployment, "gpt-dep"),
        ("/openai/deployments/gpt-dep/embeddings?api-version=2024-10-21", "gpt-dep"),
        ("/openai/v1/chat/completions", "gpt-entra"),
        ("/openai/v1/chat/completions", "openai.gpt-oss"),
        ("/openai/v1/responses", "gpt-entra"),
        (deployment, "gpt-dep"),
    ]


async def test_clients_of_vertex_and_of_anthropic_reach_both(
    gateway: Gateway, clouds: Clouds
) -> None:
    from anthropic import AsyncAnthropic, AsyncAnthropicVertex
    from google import genai
    from google.oauth2.credentials import Credentials

    claude: Any = {"model": "claude-x", "max_tokens": 50, "messages": SAY}
    options = genai.types.HttpOptions(base_url=gateway.url)
    google = genai.Client(
        vertexai=True,
        project="of-a-client",
        location="europe-west1",
        credentials=Credentials(token="of-a-client"),  # type: ignore[no-untyped-call]
        http_options=options,
    )
    async with (
        AsyncAnthropicVertex(
            base_url=f"{gateway.url}/v1",
            region="europe-west1",
            project_id="of-a-client",
            access_token="of-a-client",
        ) as vertex,
        AsyncAnthropic(base_url=gateway.url, api_key="of-a-client") as plain,
    ):
        for client in (vertex, plain):
            messages = client.messages
            whole = await messages.with_raw_response.create(**claude)
            row = await gateway.audit(whole.headers["x-tidegate-request-id"])
            assert (row["model"], row["upstream"], row["status"]) == (
                *("claude-x", "vertex"),
                "succeeded",
            )
            assert row["output_tokens"] == (await whole.parse()).usage.output_tokens
            async with messages.stream(**claude) as stream:
                assert [piece async for piece in stream.text_stream]
    answer = await google.aio.models.generate_content(model="gemini-v1", contents="Say hello")
    assert answer.text
    await google.aio.aclose()
    google.close()
    below = f"projects/{PROJECT}/locations/global/publishers"
    assert [path for path, _ in clouds.seen] == [
        *[
            f"/v1/{below}/anthropic/models/claude-x:rawPredict",
            f"/v1/{below}/anthropic/models/claude-x:streamRawPredict",
        ]
        * 2,
        f"/v1beta1/{below}/google/models/gemini-v1:generateContent",
    ]


async def test_clients_of_clouds_reach_anthropics_own_api(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anthropic import (
        AsyncAnthropicBedrockMantle,
        AsyncAnthropicFoundry,
        AsyncAnthropicVertex,
    )

    monkeypatch.setenv("ANTHROPIC_KEY", "k")
    async with run_emulator() as emulator:
        path = tmp_path / "own.toml"
        path.write_text(
            f'[upstreams.own]\nbase_url = "{emulator.url}"\ndialect = "anthropic"\n'
            'key = "ANTHROPIC_KEY"\nmodels = ["claude-*"]\n'
        )
        gateway = await open_gateway(worker=False, tidegate_policy=path)
        async with AsyncAnthropicVertex(
            base_url=f"{gateway.url}/v1", region="r", project_id="p", access_token="t"
        ) as client:
            whole = await client.messages.create(model="claude-y", max_tokens=50, messages=SAY)
            counted = await client.messages.count_tokens(model="claude-y", messages=SAY)
        clients: list[Any] = [
            AsyncAnthropicBedrockMantle(base_url=f"{gateway.url}/anthropic", api_key="t"),
            AsyncAnthropicFoundry(base_url=f"{gateway.url}/anthropic", api_key="t"),
        ]
        for one in clients:
            async with one as other:
                asked = {"model": "claude-z", "max_tokens": 50, "messages": SAY}
                assert (await other.messages.create(**asked)).model == "claude-z"
        called = (await emulator.control.calls())[0]
    assert (whole.model, called.model) == ("claude-y", "claude-y")
    assert counted.input_tokens > 0


async def test_prompts_reach_vertex_and_a_lost_token_is_a_dead_key(
    policy: Path, clouds: Clouds, open_gateway: Opener
) -> None:
    config = Config.model_validate({"tidegate_policy": policy})
    found = {one.name: one for one in deployed_upstreams(config).upstreams}
    answer, sink = Answer(), Collected()
    signers = Signers()
    await signers.open([vertex := found["vertex"]])
    await prompt(vertex, signers, answer, sink)
    signers.close()
    assert answer.text
    assert "/publishers/google/models/gemini-2.5-flash:streamGenerate" in clouds.seen[-1][0]
    clouds.token_error = 503
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    body = {"model": "claude-x", "max_tokens": 50, "messages": SAY}

    async def ask() -> tuple[int, str]:
        async with gateway.http.post(f"{gateway.url}/v1/messages", json=body) as response:
            return response.status, await response.text()

    status, text = await ask()
    assert (status, "ya29" in text, "Traceback" in text) == (502, False, False)
    assert gateway.services.spine.health["vertex"].key_dead
    clouds.token_error = 0
    authentication = vertex.access("anthropic").authentication
    assert authentication is not None
    gateway.services.relay.wire.signers[authentication].refused()

    async def is_back() -> bool:
        return bool(clouds.issued)

    await wait_until(is_back, 10, "the token is renewed")


async def test_a_call_that_waits_beyond_its_credentials_is_signed_by_those_that_replaced_them(
    policy: Path, clouds: Clouds, tmp_path: Path
) -> None:
    def read() -> Upstream:
        config = Config.model_validate({"tidegate_policy": policy})
        return next(one for one in deployed_upstreams(config).upstreams if one.name == "vertex")

    old = read()
    authentication, place = old.access("gemini").authentication, RelayWire.place(f"{clouds.url}/x")
    assert authentication is not None
    async with open_wire(PATIENT, [old]) as wire:
        first = wire.signers[authentication].sign("POST", place, [], b"{}")
        clouds.service_account(tmp_path)
        new = read()
        assert new.access("gemini").authentication != authentication
        signers = wire.signers
        assert isinstance(signers, Signers)
        await signers.open([new])
        signers.keep([new])
        assert signers[authentication].sign("POST", place, [], b"{}") == first
        signers._signers[authentication]._clock = lambda: time.time() + 3_600  # their end
        second = signers[authentication].sign("POST", place, [], b"{}")
        assert second != first
        signers.keep([new])  # those that have ended are forgotten
        assert signers[authentication].sign("POST", place, [], b"{}") == second
        signers.keep([])
        with pytest.raises(KeyError):
            signers[authentication]


@pytest.fixture
def proxied_first(policy: Path) -> Path:
    """With another upstream by the same account, by a proxy that is away."""
    file = policy.read_text()
    begins = file.index("[upstreams.vertex]")
    proxied = file[begins : file.index("[upstreams.bedrock]")].replace("vertex]", "proxied]", 1)
    policy.write_text(f'{proxied}proxy = "http://127.0.0.1:1"\n{file}')
    return policy


async def test_tokens_are_requested_by_the_proxy_of_each_upstream(
    proxied_first: Path, clouds: Clouds
) -> None:
    config = Config.model_validate({"tidegate_policy": proxied_first})
    found = deployed_upstreams(config).upstreams
    place = RelayWire.place(f"{clouds.url}/v1/x")
    async with open_wire(PATIENT, [one for one in found if one.provider == "vertex"]) as wire:

        def has_token(name: str) -> bool:
            (authentication,) = {
                one.access("gemini").authentication for one in found if one.name == name
            }
            assert authentication is not None
            try:
                wire.signers[authentication].sign("POST", place, [], b"{}")
            except UpstreamUnauthorized:
                return False
            return True

        assert {name: has_token(name) for name in ("proxied", "vertex")} == {
            "proxied": False,
            "vertex": True,
        }


async def test_a_role_that_aws_refuses_is_requested_until_it_is_given(
    policy: Path, clouds: Clouds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (identity := tmp_path / "identity").write_text("of-the-pod")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/gateway")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(identity))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"{clouds.url}/sts")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    clouds.token_error = 403
    config = Config.model_validate({"tidegate_policy": policy})
    bedrock = deployed_upstreams(config).upstream("bedrock")
    assert bedrock is not None
    authentication = bedrock.access("openai").authentication
    assert authentication is not None
    place = RelayWire.place(f"{clouds.url}/openai/v1/chat/completions")
    async with open_wire(PATIENT, [bedrock]) as wire:
        signer = wire.signers[authentication]
        with pytest.raises(UpstreamUnauthorized):
            signer.sign("POST", place, [], b"{}")
        clouds.token_error = 0

        def is_signed() -> bool:
            try:
                return dict(signer.sign("POST", place, [], b"{}"))[b"authorization"] != b""
            except UpstreamUnauthorized:
                return False

        await wait_until(is_signed, 10, "the role is given")


async def prompt(upstream: Upstream, signers: Any, answer: Answer, sink: Collected) -> None:
    processor = GeminiProcessor(
        api_key="",
        base_url=upstream.base_urls["gemini"],
        timeouts=PATIENT,
        access=upstream.access("gemini"),
        signers=signers,
    )
    await processor.start()
    try:
        await processor.run(call(), answer, sink)
    finally:
        await processor.aclose()


async def test_a_replaced_file_of_a_service_account_is_read_after_its_old_key_fails(
    clouds: Clouds, tmp_path: Path
) -> None:
    file = clouds.service_account(tmp_path)
    source = GoogleSource(
        Authentication("google", options=(("credentials_file", str(file)),)), None
    )
    await asyncio.to_thread(source.read)
    (tmp_path / "next").mkdir()
    clouds.service_account(tmp_path / "next").replace(file)  # the key before it ends
    with pytest.raises(CredentialsUnavailable):
        await asyncio.to_thread(source.read)
    token = await asyncio.to_thread(source.read)
    assert token.authorization.startswith(b"Bearer ")
