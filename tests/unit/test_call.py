"""The internal types: ids that sort by time, and values that cannot change."""

from __future__ import annotations

import dataclasses
import time
from uuid import RFC_4122, uuid4

import pytest

from tidegate import call
from tidegate.call import CLASSIFIER_LIMIT, Answer, Call, Caller, Kind, Usage, new_id


def test_an_id_is_a_uuid_of_version_7_that_holds_the_time_in_milliseconds() -> None:
    before = time.time_ns() // 1_000_000
    made = new_id()
    after = time.time_ns() // 1_000_000
    assert made.version == 7
    assert made.variant == RFC_4122
    assert before <= made.int >> 80 <= after


def test_ids_differ_and_those_of_later_milliseconds_sort_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len({new_id() for _ in range(10_000)}) == 10_000
    clock = iter(range(10**18, 10**18 + 10**9, 10**6))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    made = [new_id() for _ in range(100)]
    assert made == sorted(made)
    assert [str(one) for one in made] == sorted(str(one) for one in made)


def test_each_kind_has_a_limit_of_its_own_and_the_classifier_another() -> None:
    limits = [kind.limit for kind in Kind]
    assert limits == ["kind:text_only", "kind:multi_modal", "kind:image_generation"]
    assert CLASSIFIER_LIMIT not in limits


def test_the_kinds_are_those_that_the_settings_limit() -> None:
    from tidegate.settings import KINDS

    assert tuple(kind.value for kind in Kind) == KINDS


def test_unknown_usage_is_none_and_never_zero() -> None:
    assert all(value is None for value in dataclasses.asdict(Usage()).values())


def test_an_answer_is_whole_when_its_parts_are_joined() -> None:
    answer = Answer()
    assert answer.whole_text == ""
    answer.text += ["a", "", "b"]
    assert answer.whole_text == "ab"
    assert Answer().text == []


@pytest.mark.parametrize(
    "kind_of_value",
    [
        one
        for one in vars(call).values()
        if isinstance(one, type) and dataclasses.is_dataclass(one) and one is not Answer
    ],
)
def test_what_travels_is_frozen_and_slotted(kind_of_value: type) -> None:
    assert kind_of_value.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(kind_of_value)


def test_a_call_cannot_be_changed_on_its_way() -> None:
    made = Call(uuid4(), "a prompt", Kind.TEXT_ONLY, "a model")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.prompt = "another"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("models", "model", "may"),
    [
        (None, "anything", True),
        ((), "anything", False),
        (("gemini-*",), "gemini-2.5-flash", True),
        (("gemini-*",), "models/gemini-2.5-flash", True),
        (("gemini-*",), "gpt-5", False),
        (("gemini-*",), "Gemini-2.5-flash", False),
        (("gemini-2.5-flash",), "gemini-2.5-flash-image", False),
        (("gpt-5", "gemini-3-?"), "gemini-3-a", True),
    ],
)
def test_a_caller_may_ask_the_models_that_its_patterns_name(
    models: tuple[str, ...] | None, model: str, may: bool
) -> None:
    assert Caller(models=models).may_ask(model) is may
