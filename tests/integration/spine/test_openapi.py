"""The API's description: what it says is what the API does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest
from fastapi import FastAPI

from tests.gateway import PNG, Opener
from tidegate.app import create_app
from tidegate.http.problems import STATUS
from tidegate.http.submission import read_fields
from tidegate.settings import Config

PROBLEM = "application/problem+json"
PATHS = {
    "/submit": "post",
    "/stream": "post",
    "/status/{request_id}": "get",
    "/files/{file_id}": "get",
    "/requests": "get",
    "/requests/running": "get",
    "/usage": "get",
    "/admin/usage": "get",
    "/admin/calls/{path}": "post",
    "/admin/latency": "get",
    "/requests/{request_id}": "delete",
    "/requests/{request_id}/why": "get",
    "/requests/{request_id}/request": "get",
    "/requests/{request_id}/response": "get",
    "/metrics": "get",
    "/admin/process": "get",
    "/admin/settings": "get",
    "/health/live": "get",
    "/health/ready": "get",
    "/health/dependencies": "get",
    "/admin/limits": "get",
    "/admin/limits/history": "get",
    "/admin/limits/{limit_id}": "put",
    "/admin/limits/accept": "post",
    "/admin/limits/rehearse": "post",
    "/admin/budgets": "get",
    "/admin/budgets/books": "get",
    "/admin/budgets/{name}": "put",
    "/admin/budgets/{name}/resume": "post",
    "/admin/alerts": "get",
    "/admin/alerts/test": "post",
    "/admin/alerts/{alert_id}/redeliver": "post",
    "/admin/conversations": "get",
    "/admin/batches": "get",
    "/admin/batches/{batch_id}/pause": "post",
    "/admin/batches/{batch_id}/resume": "post",
    "/admin/batches/{batch_id}/cancel": "post",
    "/admin/batches/{batch_id}/results/{which}": "get",
    "/admin/upstreams": "get",
    "/admin/upstreams/history": "get",
    "/admin/upstreams/providers": "get",
    "/admin/upstreams/rollback": "post",
    "/admin/upstreams/{name}": "put",
    "/admin/upstreams/{name}/prices": "get",
    "/admin/upstreams/{name}/test": "post",
    "/admin/upstreams/{name}/drain": "post",
    "/admin/upstreams/{name}/resume": "post",
    "/admin/reconciliations": "get",
    "/admin/limits/{limit_id}/pause": "post",
    "/admin/limits/{limit_id}/resume": "post",
    "/admin/permits": "get",
    "/admin/permits/{process}": "delete",
    "/admin/why/{what}": "get",
    "/admin/estimates": "get",
    "/admin/requests": "get",
    "/admin/requests/running": "get",
    "/admin/requests/{request_id}": "get",
    "/admin/requests/{request_id}/request": "get",
    "/admin/requests/{request_id}/response": "get",
    "/admin/requests/{request_id}/files/{file_id}": "get",
    "/admin/requests/{request_id}/cancel": "post",
    "/admin/requests/{request_id}/retry": "post",
    "/admin/requests/{request_id}/replay": "post",
    "/admin/requests/requeue": "post",
    "/admin/tenants": "get",
    "/admin/tenants/{tenant_id}": "get",
    "/admin/keys": "get",
    "/admin/keys/{prefix}": "delete",
    "/admin/webhooks": "get",
    "/admin/webhooks/{webhook_id}/redeliver": "post",
    "/admin/dead": "get",
    "/admin/dead/{request_id}/requeue": "post",
    "/admin/dead/{request_id}/discard": "post",
    "/admin/subjects/{subject}": "delete",
    "/admin/actions": "get",
}
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def broken(value: Any, schema: dict[str, Any], document: dict[str, Any], at: str = "$") -> str:
    """Why `value` is not what `schema` says, or nothing: the part of JSON Schema that we use."""
    if "$ref" in schema:
        target = document
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return broken(value, target, document, at)
    if "anyOf" in schema:
        found = [broken(value, option, document, at) for option in schema["anyOf"]]
        return "" if "" in found else found[0]
    if "const" in schema and value != schema["const"]:
        return f"{at}: not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{at}: {value!r} is none of {schema['enum']}"
    if "type" in schema and not isinstance(value, TYPES[schema["type"]]):
        return f"{at}: {value!r} is no {schema['type']}"
    if isinstance(value, dict):
        if missing := set(schema.get("required", ())) - value.keys():
            return f"{at}: without {missing}"
        known = schema.get("properties", {})
        if schema.get("additionalProperties", True) is False and value.keys() - known.keys():
            return f"{at}: unknown {value.keys() - known.keys()}"
        for name, item in value.items():
            if why := broken(item, known.get(name, {}), document, f"{at}.{name}"):
                return why
    if isinstance(value, list):
        for index, item in enumerate(value):
            if why := broken(item, schema.get("items", {}), document, f"{at}[{index}]"):
                return why
    return ""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The description, of an application that need not run for it."""
    return create_app(Config()).openapi()


def _references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(_references(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_references(item) for item in value))
    return set()


def test_it_is_whole_and_names_every_path_once(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"]
    assert {path: next(iter(item)) for path, item in document["paths"].items()} == PATHS
    for reference in _references(document):
        target: Any = document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]
        assert target, reference
    operations = [
        item[method] for path, method in PATHS.items() for item in [document["paths"][path]]
    ]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)
    assert all(operation["summary"] and operation["tags"] for operation in operations)


def test_errors_are_problem_json_and_nothing_else(document: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in str(document)
    for path, method in PATHS.items():
        for status, response in document["paths"][path][method]["responses"].items():
            if status < "400" or path.startswith("/health"):
                continue
            assert list(response["content"]) == [PROBLEM], (path, status)
            schema = response["content"][PROBLEM]["schema"]
            assert schema == {"$ref": "#/components/schemas/Problem"}
    stated = {int(status) for status in document["paths"]["/stream"]["post"]["responses"]}
    # 426 answers a WebSocket at a path of a provider's API.
    assert {
        status for status in STATUS.values() if status not in (401, 403, 404, 405, 409, 426)
    } <= stated
    # A native call that is wrapped may name a model that no upstream has.
    assert "404" in document["paths"]["/submit"]["post"]["responses"]


def test_submit_documents_every_content_type_and_field_that_it_takes(
    document: dict[str, Any],
) -> None:
    content = document["paths"]["/submit"]["post"]["requestBody"]["content"]
    assert set(content) == {
        *("application/json", "multipart/form-data", "application/x-www-form-urlencoded"),
    }
    values = {"data", "text", "image_uri", "type", "model", "priority", "deadline_ms"}
    values |= {"webhook_url", "subject", "conversation", "tiers"}
    for media, described in content.items():
        files = {"file", "files"} if media == "multipart/form-data" else set()
        wrapped = {"endpoint", "body"} if media == "application/json" else set()
        assert set(described["schema"]["properties"]) == values | files | wrapped
    for name, example in content["application/json"]["examples"].items():
        assert broken(example["value"], content["application/json"]["schema"], document) == ""
        assert read_fields(example["value"], Config(), is_allowed=lambda _: True).prompt, name


def test_every_example_of_an_answer_is_what_its_schema_says(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    with_examples = {name for name, schema in schemas.items() if "example" in schema}
    assert with_examples == {"Accepted", "StatusView", "Problem"}
    for name in with_examples:
        assert broken(schemas[name]["example"], schemas[name], document) == ""


def test_the_comparison_sees_what_is_wrong() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    assert broken({"a": 1}, schema, {}) == ""
    assert broken({}, schema, {})
    assert broken({"a": "1"}, schema, {})
    assert broken({"a": 1, "b": 2}, schema | {"additionalProperties": False}, {})


async def test_real_answers_are_what_the_description_says(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    status, document = await gateway.get("/openapi.json")
    assert status == 200
    schemas = document["components"]["schemas"]
    async with gateway.http.post(f"{gateway.url}/submit", json={"data": "Nice!"}) as response:
        accepted = await response.json()
    assert broken(accepted, schemas["Accepted"], document) == ""
    records = [await gateway.status(accepted["request_id"])]
    await gateway.upstream.set_fault("internal", match="Explain failing")
    gateway.start_worker(max_attempts=1)
    for body in (
        {"data": "Generate an image of a fox"},
        {"data": "Describe this picture", "file": PNG},
        {"data": "Explain failing"},
        {"data": "Explain", "deadline_ms": 60_000},
    ):
        records.append(await gateway.end_of(await gateway.submit(**body)))
    assert {record["status"] for record in records} == {"queued", "succeeded", "failed"}
    for record in records:
        assert broken(record, schemas["StatusView"], document) == ""
    problems = [(await gateway.get(path))[1] for path in ("/status/x", "/nothing")]
    problems.append((await gateway.stream(text="Explain failing")).problem)
    for problem in problems:
        assert broken(problem, schemas["Problem"], document) == ""
    for path, name in (
        ("ready", "Readiness"),
        ("live", "Liveness"),
        ("dependencies", "Dependencies"),
    ):
        assert broken((await gateway.get(f"/health/{path}"))[1], schemas[name], document) == ""


async def test_the_documentation_is_served_from_here(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for path in ("/docs", "/", "/static/vendor/swagger-ui/swagger-ui.css"):
        async with gateway.http.get(gateway.url + path) as response:
            text = await response.text()
            assert response.status == 200
            assert "https://cdn" not in text


def test_the_first_readers_of_the_description_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is answered in a thread, and FastAPI sets the names of all models of the routes while it
    describes them: two descriptions built beside one another end in a KeyError."""
    both, built, describe = Barrier(2), [], FastAPI.openapi

    def build(described: FastAPI) -> dict[str, Any]:
        built.append(described)
        with suppress(BrokenBarrierError):
            both.wait(0.2)
        return describe(described)

    monkeypatch.setattr(FastAPI, "openapi", build)
    app = create_app(Config)
    with ThreadPoolExecutor(2) as readers:
        first, second = readers.map(lambda _: app.openapi(), range(2))
    assert first is second
    assert built == [app]
