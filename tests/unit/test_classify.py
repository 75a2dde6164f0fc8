"""What kind of request a prompt with its files is: the promises, one by one."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tidegate.call import Classification, ClassifiedBy, Kind
from tidegate.classify import by_keywords, by_rules
from tidegate.classify.vocabulary import HEAD_CHARS, TAIL_CHARS, _entries, clip, normalise

DATA = Path(__file__).parent.parent / "data"
DEV = DATA / "prompts_dev.jsonl"
UNSEEN_BAR = 0.95
ACCURACY_BAR = 0.97
RULES_PRECISION_BAR = 0.995
RULES_DECIDE_BAR = 0.70

Example = tuple[str, list[str], Kind]


def examples_of(path: Path) -> list[Example]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["files"], Kind(row["expected"])) for row in rows]


def kind(prompt: str, *files: str) -> Kind | None:
    return by_keywords(prompt, files).kind


@pytest.mark.parametrize(
    "prompt",
    [
        "Describe this image",
        "draw up a contract",
        "write code that makes an image",
        "what conclusions can you draw",
        "Explain the importance of cybersecurity in modern businesses.",
        "Translate 'draw a dog' into Spanish",
        "Don't make an image, just describe the scene",
        "",
    ],
)
def test_a_prompt_that_wants_words_is_text(prompt: str) -> None:
    assert kind(prompt) is Kind.TEXT_ONLY


@pytest.mark.parametrize(
    "prompt",
    [
        "a cyberpunk alley at night, neon, 35mm, --ar 16:9",
        "Dibuja un perro",
        "paint me a fox",
        "Generate an image of a futuristic city with flying cars.",
        "logo for a coffee shop, flat vector, minimal",
        "genrate an imgae of a cat",
        "DRAW A DRAGON",
        "\uff44\uff52\uff41\uff57 a dragon",  # full-width letters
        "\u200bdraw\u200b a dragon",
        "Générer une image d'un château",
        "Ge\u0301ne\u0301rer une image d'un cha\u0302teau",  # the same, decomposed
    ],
)
def test_a_prompt_that_wants_a_picture_is_image_generation(prompt: str) -> None:
    assert kind(prompt) is Kind.IMAGE_GENERATION


@pytest.mark.parametrize("decide", [by_rules, by_keywords])
def test_a_file_that_is_no_image_decides_alone(decide: Callable[..., Classification]) -> None:
    answer = decide("Draw a picture of the main character", ["application/pdf"])
    assert answer.kind is Kind.MULTI_MODAL


@pytest.mark.parametrize("decide", [by_rules, by_keywords])
def test_an_image_without_a_prompt_is_multi_modal(decide: Callable[..., Classification]) -> None:
    assert decide("", ["image/png"]).kind is Kind.MULTI_MODAL
    assert decide("  \n", (), image_uri=True).kind is Kind.MULTI_MODAL


@pytest.mark.parametrize(
    "prompt", ["remove the background", "make it black and white", "add a hat to the dog"]
)
def test_changing_an_attached_image_is_image_generation(prompt: str) -> None:
    assert kind(prompt, "image/jpeg") is Kind.IMAGE_GENERATION
    assert by_keywords(prompt, (), image_uri=True).kind is Kind.IMAGE_GENERATION
    assert kind(prompt) is Kind.TEXT_ONLY, "without an image there is nothing to change"


def test_an_image_among_other_files_can_be_changed_but_not_by_rules_alone() -> None:
    files = ["image/png", "application/pdf"]
    assert by_keywords("remove the background", files).kind is Kind.IMAGE_GENERATION
    assert by_rules("remove the background", files).kind is None


def test_the_media_type_is_read_in_any_case_and_with_parameters() -> None:
    assert kind("remove the background", "IMAGE/PNG; x=y") is Kind.IMAGE_GENERATION


def test_rules_leave_what_they_cannot_tell_and_say_why() -> None:
    answer = by_rules("a quiet harbour", [])
    assert answer.kind is None
    assert answer.by is ClassifiedBy.RULES
    assert answer.reason.startswith("not sure")


def test_keywords_always_decide_and_sign_their_answer() -> None:
    answer = by_keywords("xyzzy", [])
    assert answer.kind is Kind.TEXT_ONLY
    assert answer.by is ClassifiedBy.KEYWORDS
    assert answer.reason


def test_what_the_rules_decide_the_keywords_decide_too() -> None:
    for prompt, files, _ in examples_of(DEV):
        sure = by_rules(prompt, files).kind
        assert sure in (None, by_keywords(prompt, files).kind), prompt


def test_the_development_set_is_large_balanced_and_in_many_languages() -> None:
    rows = [json.loads(line) for line in DEV.read_text(encoding="utf-8").splitlines()]
    kinds = Counter(row["expected"] for row in rows)
    assert len(rows) >= 400
    assert len({row["language"] for row in rows}) >= 18
    assert set(kinds) == set(Kind)
    assert 0.4 <= kinds["image_generation"] / len(rows) <= 0.6
    assert len({(row["prompt"], *row["files"]) for row in rows}) == len(rows)


def test_keywords_are_right_on_the_development_set() -> None:
    examples = examples_of(DEV)
    wrong = [(p, k) for p, files, k in examples if by_keywords(p, files).kind is not k]
    assert len(wrong) <= (1 - ACCURACY_BAR) * len(examples), wrong


def test_rules_are_precise_and_decide_most_of_the_development_set() -> None:
    answers = [(by_rules(p, files).kind, k) for p, files, k in examples_of(DEV)]
    decided = [(given, k) for given, k in answers if given is not None]
    right = sum(given is k for given, k in decided)
    assert right >= RULES_PRECISION_BAR * len(decided)
    assert len(decided) >= RULES_DECIDE_BAR * len(answers)


def test_keywords_hold_the_bar_on_prompts_that_the_rules_never_saw() -> None:
    """Counts only: to print the prompts would be to look at them."""
    examples = examples_of(DATA / "prompts_heldout.jsonl")
    right = sum(by_keywords(p, files).kind is k for p, files, k in examples)
    assert len(examples) >= 100
    assert right >= UNSEEN_BAR * len(examples)


@pytest.mark.parametrize("name", ["fresh", "fresh2", "fresh3", "fresh4", "fresh5"])
def test_keywords_stay_right_on_each_later_set(name: str) -> None:
    examples = examples_of(DATA / f"prompts_{name}.jsonl")
    wrong = [(p, k) for p, files, k in examples if by_keywords(p, files).kind is not k]
    assert len(wrong) <= (1 - ACCURACY_BAR) * len(examples), wrong


NASTY = [
    "a" * 50_000,
    "draw " * 10_000,
    '"' * 50_000,
    "'a " * 20_000,
    "« " * 20_000,
    "```" * 20_000,
    "draw a " + "very, " * 10_000 + "contract",
    "--ar " * 10_000,
    "(a:1.1 " * 10_000,
    "1" * 50_000 + "x" + "1" * 50_000,
    "画" * 50_000,
    "그려 " * 20_000,
    "e" + "\u0301" * 50_000,
    "\ufdfa" * 50_000,  # one character that NFKC makes eighteen
    "?!." * 20_000,
    "if" * 40_000,
]


def steps(prompt: str) -> int:
    """Calls and lines of our own code that a classification runs: no clock, so no flicker."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if "classify" not in frame.f_code.co_filename:
            return None
        count += 1
        return trace

    by_keywords(prompt, ["image/png"])  # the first one of a process reads the vocabularies too
    _entries.cache_clear()  # or the second of two prompts would look cheaper
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        by_keywords(prompt, ["image/png"])
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("prompt", NASTY, ids=lambda p: ascii(p[:12]))
def test_work_does_not_grow_with_a_prompt_beyond_the_clip(prompt: str) -> None:
    assert steps(prompt * 8) <= steps(prompt) * 1.1


@pytest.mark.parametrize("prompt", NASTY, ids=lambda p: ascii(p[:12]))
def test_work_grows_no_faster_than_the_prompt(prompt: str) -> None:
    short, long = steps(prompt[:1000]), steps(prompt[:4000])
    assert long <= short * 8 + 2000, "four times the prompt may cost four times, not sixteen"


def test_an_instruction_at_either_end_of_a_long_prompt_is_seen() -> None:
    material = "The committee met on Monday and approved the minutes. " * 20_000
    assert kind("Draw a dragon.\n" + material) is Kind.IMAGE_GENERATION
    assert kind(material + "\nNow draw a dragon.") is Kind.IMAGE_GENERATION
    assert kind("Summarise this.\n" + material) is Kind.TEXT_ONLY


def test_only_the_ends_of_a_long_prompt_are_looked_at() -> None:
    prompt = "x" * 1_000_000
    assert len(clip(prompt)) == HEAD_CHARS + TAIL_CHARS + 1
    assert len(normalise(prompt)) <= HEAD_CHARS + TAIL_CHARS + 1
