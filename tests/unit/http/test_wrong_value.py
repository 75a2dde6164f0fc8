"""What a caller hears of a value that its type refuses."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tidegate.call import Kind
from tidegate.errors import ConfigError, InvalidRequest
from tidegate.http.admin.limits import body_error, config_errors_refused
from tidegate.http.problems import in_words


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = ""


class Named(BaseModel):
    name: str


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (UUID, "zzz", ("is not an id", "an id, such as request_id in the answer of /submit")),
        (int, "ten", ("is not a whole number", "a whole number")),
        (Annotated[int, Field(le=200)], "999", ("is too large", "200 or less")),
        (Annotated[float, Field(ge=0)], "-1", ("is too small", "0.0 or more")),
        (Annotated[int, Field(gt=0)], "0", ("is too small", "more than 0")),
        (date, "x", ("is not a day", "a day such as 2026-01-31")),
        (date, "20260131", ("is not a day", "a day such as 2026-01-31")),
        (date, "2026-01-31T10:00:00Z", ("is not a day", "a day such as 2026-01-31")),
        (Annotated[str, Field(max_length=2)], "abc", ("is too long", "2 characters or fewer")),
        (Literal["day", "month"], "year", ("is not known", "'day' or 'month'")),
        (Kind, "poem", ("is not known", "'text_only', 'multi_modal' or 'image_generation'")),
        (Strict, {"limits": 1}, ("is not known", None)),
        (Named, {}, ("is not given", "required")),
        (Decimal, "a", ("is not a number", "a number")),
        (bool, "perhaps", ("is neither true nor false", "true or false")),
    ],
)
def test_what_is_wrong_and_allowed_is_said(
    kind: Any, value: object, said: tuple[str, str | None]
) -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(kind).validate_python(value)
    assert in_words(dict(refused.value.errors()[0])) == said


def test_what_has_no_words_of_ours_is_told_in_pydantics() -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(complex).validate_python("x")
    wrong, allowed = in_words(dict(refused.value.errors()[0]))
    assert (wrong.startswith("is not valid: Input should be "), allowed) == (True, None)


def test_a_field_that_an_operators_body_can_not_have_is_told_with_those_that_it_can() -> None:
    with pytest.raises(ValidationError) as refused:
        Strict.model_validate({"nmae": "x"})
    told = body_error(Strict, refused.value)
    assert (told.field, told.message, told.allowed) == ("nmae", "nmae is not known", "name")


@pytest.mark.parametrize(
    ("value", "allowed", "said"),
    [
        ("0", "a whole number from 1 to 60000", "pace_ms: a whole number from 1 to 60000"),
        (None, "is unknown; known: bound", "pace_ms is unknown; known: bound"),
    ],
)
def test_a_wrong_value_of_a_policy_is_separated_from_what_is_allowed(
    value: str | None, allowed: str, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{said}$"), config_errors_refused():
        raise ConfigError("pace_ms", value, allowed)
