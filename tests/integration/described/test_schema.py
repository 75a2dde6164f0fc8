"""Every operation of openapi.json, asked with what its schema allows and with what it does not.

Schemathesis makes the requests. There is no 5xx but a 503 or 504 that the description names, and
every answer is one that it describes, by status, type and schema.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.core.control import SkipTest
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import AS_ADMIN, key_of, submitted
from tidegate.call import Scope

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("TIDEGATE_SCHEMA_EXAMPLES", "6"))
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
MAY_BE_AWAY = (503, 504)
PATIENCE_S = 60  # a rehearsal gives way to all that runs beside it


@pytest.fixture
async def gateway(open_gateway: Opener) -> Gateway:
    return await open_gateway(
        auth="on",
        admin_token=AS_ADMIN["Authorization"].removeprefix("Bearer "),
        stream_wait_ms=200,
        receive_timeout_ms=1_000,
    )


def config(mode: schemathesis.GenerationMode) -> SchemathesisConfig:
    generation = GenerationConfig(modes=[mode], deterministic=True, with_security_parameters=False)
    return SchemathesisConfig(projects=ProjectsConfig(default=ProjectConfig(generation=generation)))


class Asking:
    """Asks; `asked` says how often each operation was, `wrong` what was found."""

    def __init__(self, url: str, headers: dict[str, str], known: dict[str, str]) -> None:
        self._url = url
        self._headers = headers
        self._known = known
        self.asked: dict[str, int] = {}
        self.wrong: dict[str, str] = {}

    def all_of(self, document: dict[str, Any], mode: schemathesis.GenerationMode) -> None:
        schema = schemathesis.openapi.from_dict(document, config=config(mode))
        for result in schema.get_all_operations():
            assert isinstance(result, Ok), result
            operation = result.ok()
            try:
                self._one(operation, mode)
            except SkipTest:  # it takes nothing that could be wrong
                continue
            except (AssertionError, BaseExceptionGroup) as found:
                self.wrong[operation.label] = "\n".join(
                    map(str, getattr(found, "exceptions", [found]))
                )

    def _one(
        self,
        operation: schemathesis.APIOperation[Any, Any, Any, Any],
        mode: schemathesis.GenerationMode,
    ) -> None:
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(case=operation.as_strategy(generation_mode=mode), real=st.booleans())
        def ask(case: schemathesis.Case[Any], real: bool) -> None:
            if real:  # half of the time something that is there
                for key in self._known.keys() & case.path_parameters.keys():
                    case.path_parameters[key] = self._known[key]
            self.asked[operation.label] = self.asked.get(operation.label, 0) + 1
            response = case.call(base_url=self._url, headers=self._headers, timeout=PATIENCE_S)
            if response.status_code not in MAY_BE_AWAY:
                case.validate_response(response, checks=[not_a_server_error])
            case.validate_response(response, checks=CHECKS)

        ask()


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
async def test_every_operation_answers_as_described(
    gateway: Gateway, mode: schemathesis.GenerationMode
) -> None:
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    _, document = await gateway.get("/openapi.json")
    headers = await key_of(gateway, "acme", scopes=tuple(Scope))
    request_id = await submitted(gateway, headers, data="Generate an image of a fox")
    known = {"request_id": request_id, "limit_id": "kind:text_only", "tenant_id": "acme"}
    asking = Asking(gateway.url, headers, known)
    await asyncio.to_thread(asking.all_of, document, mode)
    assert not asking.wrong, "\n".join(f"{name}: {why}" for name, why in asking.wrong.items())
    described = sum(len(operations) for operations in document["paths"].values())
    if mode is schemathesis.GenerationMode.POSITIVE:
        assert len(asking.asked) == described
    assert sum(asking.asked.values()) > 100
