"""boto3's bedrock-runtime and AnthropicBedrock: Converse and InvokeModel, whole and streamed."""

import json

import boto3
from anthropic import AnthropicBedrock
from botocore import UNSIGNED
from botocore.config import Config
from cases import CLAUDE, KEY, QUESTION, URL, answered, case, run

REGION = "us-east-1"
# A bearer goes over TLS alone with boto3; a gateway without TLS is called unsigned.
runtime = boto3.client(
    "bedrock-runtime",
    endpoint_url=URL,
    region_name=REGION,
    config=Config(signature_version=UNSIGNED, retries={"total_max_attempts": 1}),
)
sdk = AnthropicBedrock(base_url=URL, aws_region=REGION, api_key=KEY, max_retries=0)
ASKED = {
    "modelId": CLAUDE,
    "messages": [{"role": "user", "content": [{"text": QUESTION}]}],
    "inferenceConfig": {"maxTokens": 2000},
}
MESSAGES = {"max_tokens": 2000, "messages": [{"role": "user", "content": QUESTION}]}
BODY = json.dumps({"anthropic_version": "bedrock-2023-05-31", **MESSAGES})


@case("converse")
def _():
    answered(runtime.converse(**ASKED)["output"]["message"]["content"][0]["text"])


@case("converse, streamed")
def _():
    events = list(runtime.converse_stream(**ASKED)["stream"])
    deltas = [one["contentBlockDelta"]["delta"] for one in events if "contentBlockDelta" in one]
    answered("".join(delta.get("text", "") for delta in deltas))
    assert events[-1]["metadata"]["usage"]["outputTokens"] > 0


@case("converse, tools")
def _():
    schema = {"json": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tools = {"tools": [{"toolSpec": {"name": "get_weather", "inputSchema": schema}}]}
    choice = {"toolChoice": {"tool": {"name": "get_weather"}}}
    found = runtime.converse(**ASKED, toolConfig={**tools, **choice})
    assert found["stopReason"] == "tool_use", found["stopReason"]


@case("invoke")
def _():
    found = runtime.invoke_model(modelId=CLAUDE, body=BODY)
    answered(json.loads(found["body"].read())["content"][0]["text"])


@case("invoke, streamed")
def _():
    found = runtime.invoke_model_with_response_stream(modelId=CLAUDE, body=BODY)
    events = [json.loads(one["chunk"]["bytes"]) for one in found["body"]]
    assert events[-1]["amazon-bedrock-invocationMetrics"]["outputTokenCount"] > 0


@case("a refusal")
def _():
    told = ""
    try:
        runtime.converse(modelId=CLAUDE, messages=[])
    except runtime.exceptions.ValidationException as refused:
        told = str(refused)
    assert "messages" in told, "it was not refused"


@case("AnthropicBedrock")
def _():
    answered(sdk.messages.create(model=CLAUDE, **MESSAGES).content[0].text)


@case("AnthropicBedrock, streamed")
def _():
    with sdk.messages.stream(model=CLAUDE, **MESSAGES) as stream:
        answered("".join(stream.text_stream))


run()
