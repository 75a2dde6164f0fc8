"""Whether a caller may ask a model. Pure."""

from __future__ import annotations

from fnmatch import fnmatchcase

from tidegate.call import Caller
from tidegate.errors import Forbidden


def check_model(caller: Caller, model: str) -> None:
    """Raises Forbidden for a model that is not among those of the caller's tenant."""
    if caller.models is None:
        return
    plain = model.removeprefix("models/")
    if not any(fnmatchcase(plain, one) for one in caller.models):
        allowed = ", ".join(caller.models) or "none"
        raise Forbidden(f"the model {model!r} is not for this tenant; allowed: {allowed}")
