"""Whether a caller may ask a model. Pure."""

from __future__ import annotations

from tidegate.call import Caller
from tidegate.errors import Forbidden


def check_model(caller: Caller, model: str) -> None:
    """Raises Forbidden for a model that is not among those of the caller's tenant."""
    if not caller.may_ask(model):
        allowed = ", ".join(caller.models or ()) or "no model"
        raise Forbidden(
            f"tenant {caller.tenant_id} may not ask the model {model}; allowed: {allowed}",
            field="model",
            allowed=allowed,
        )
