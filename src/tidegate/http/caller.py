"""The caller of a request of ours, and what it may ask for.

Invariant: nothing of a request's body is read before its caller is known.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from tidegate.call import Caller, Classification, Kind, Scope
from tidegate.config import Config
from tidegate.errors import InvalidRequest
from tidegate.http.access import CALLER_IN_SCOPE
from tidegate.http.services import services_of
from tidegate.relay.permission import check_model
from tidegate.relay.targets import Targets


async def caller_of(request: Request, scope: Scope = Scope.INFER) -> Caller:
    """Who asks, whom the access log names as well. Raises what `Gate.identify` raises."""
    gate = services_of(request).gate
    headers, query = request.scope["headers"], request.scope["query_string"]
    caller = gate.known(headers, query) if scope is Scope.INFER else None
    if caller is None:
        caller = await gate.identify(headers, query, scope)
    request.scope[CALLER_IN_SCOPE] = caller
    return caller


async def payer_of(request: Request) -> Caller:
    """The caller of what costs something. Raises BudgetExceeded as well."""
    caller = await caller_of(request)
    await services_of(request).budgets.let_in(caller)
    return caller


async def _reader(request: Request) -> Caller:
    return await caller_of(request, Scope.READ)


Reader = Annotated[Caller, Depends(_reader)]


def check_models(
    caller: Caller, model: str | None, classification: Classification, config: Config
) -> None:
    """The model that was named, else all those that the request may turn out to need."""
    if caller.models is None:
        return
    for one in _models(model, classification, config):
        check_model(caller, one)


def check_prompt(
    targets: Targets, model: str | None, classification: Classification, config: Config
) -> None:
    """Raise InvalidRequest where no answer can come of a prompt, whatever kind it turns out to be
    of."""
    wrong: list[InvalidRequest] = []
    models = _models(model, classification, config)
    for one in models:
        try:
            targets.check_prompt(one)
        except InvalidRequest as refused:
            wrong.append(refused)
    if len(wrong) == len(models):
        raise wrong[0]


def _models(model: str | None, classification: Classification, config: Config) -> list[str]:
    if model is not None:
        return [model]
    kinds = (classification.kind,) if classification.kind is not None else tuple(Kind)
    return [config.model_for(kind) for kind in kinds]
