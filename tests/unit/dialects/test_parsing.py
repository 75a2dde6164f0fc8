"""A large body is parsed in steps of a bounded size, to what the whole says."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest

from tidegate.admission import estimator
from tidegate.admission.estimator import pieces_of_texts
from tidegate.call import ANYBODY
from tidegate.dialects import endpoint_of, parsing, requests
from tidegate.dialects.parsing import count_folded, holds, parsed, skimmed
from tidegate.dialects.requests import cache_write_of, conversation_of, opening_of
from tidegate.dialects.resources import has_escaped_key
from tidegate.dialects.spec import Dialect
from tidegate.errors import InvalidRequest
from tidegate.spine.models import read_body

STEP_BYTES = 512
CHAT = endpoint_of("POST", "/v1/chat/completions", Dialect.OPENAI)
SOME = "A text: of \"words\", [of {more},{than}] one; \\ with\nlines and 'quotes', "
WIDE = "字節跳動中文沒有空格"
TEXTS = {
    "words": "some words " * 400,
    "quotes and escapes": SOME * 90,
    "without blanks": "QUJD" * 1_200,
    "backslashes": "\\" * 3_000 + '"' * 1_500,
    "no blanks beyond ASCII": WIDE * 200,
    "pairs": "\U0001f600\U0001f680" * 700,
    "mixed": "".join(
        random.Random(1).choices(["é", "a", "字", "\U0001f600", '"', "\\", "\n", "u", " "], k=6_000)
    ),
}


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


BODIES: dict[str, Any] = {
    **{name: chat(text) for name, text in TEXTS.items()},
    "two texts": chat(TEXTS["words"], system=TEXTS["mixed"], end=True),
    "a long name": chat("x", metadata={TEXTS["words"]: 1, "y": TEXTS["pairs"]}),
    "texts in a list": {"model": "m", "input": [TEXTS["words"], TEXTS["mixed"], "x"]},
    "messages": {
        "model": "m",
        "tools": [{"a": [1, {"b": [2]}]}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": SOME}, {"type": "x", "y": []}]}
        ]
        * 100,
        "stream": True,
    },
    "texts for embeddings": {"input": [SOME[:each] for each in range(70)] * 5, "model": "m"},
    "tokens": {"model": "m", "input": [*range(4_000)]},
    "lists of tokens": {"model": "m", "input": [[*range(50)]] * 30, "n": [[]]},
    "a long text and messages": chat(TEXTS["words"]) | {"more": [{"a": SOME, "b": None}] * 90},
    "one long list within another": {"model": "m", "x": {"y": [[[{"z": [*range(5_000)]}]]]}},
    "no list": {"model": "m", "metadata": {f"k{each}": each for each in range(900)}},
}
WRITTEN: dict[str, Callable[[Any], bytes]] = {
    "compact": orjson.dumps,
    "in lines": lambda body: orjson.dumps(body, option=orjson.OPT_INDENT_2),
    "in ASCII": lambda body: json.dumps(body).encode(),
    "escaped slashes": lambda body: json.dumps(body).replace("/", "\\/").encode(),
}


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_ENDS_CHARS", 100)
    for module in (parsing, requests):
        monkeypatch.setattr(module, "LARGE_BYTES", STEP_BYTES)
    monkeypatch.setattr(estimator, "_COUNTED_CHARS", STEP_BYTES)
    monkeypatch.setattr(parsing, "_BYTES_A_TEXT", 1)  # all texts are looked at


class Parser:
    """Stands in for orjson, and notes how much it was given at most."""

    JSONDecodeError = orjson.JSONDecodeError

    def __init__(self) -> None:
        self.most_bytes = 0

    def loads(self, raw: bytes) -> Any:
        self.most_bytes = max(self.most_bytes, len(raw))
        return orjson.loads(raw)


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("name", BODIES)
def test_a_large_body_says_what_the_whole_says(name: str, written: str) -> None:
    raw = WRITTEN[written](BODIES[name])
    found = parsed(raw)
    assert found == BODIES[name]
    assert orjson.dumps(found) == orjson.dumps(orjson.loads(raw))  # also the order of its fields


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize(
    "name", set(BODIES) - {"a long name", "backslashes", "no list", "one long list within another"}
)
def test_no_step_parses_much(name: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = Parser()
    monkeypatch.setattr(parsing, "orjson", parser)
    parsed(WRITTEN[written](BODIES[name]))
    assert 0 < parser.most_bytes <= 3 * STEP_BYTES


def test_a_random_body_is_read_or_refused_as_the_whole() -> None:
    chance = random.Random(5)
    raws = [WRITTEN[written](body) for body in BODIES.values() for written in WRITTEN]
    outcomes = set()
    for _ in range(3_000):
        raw = bytearray(chance.choice(raws))
        at = chance.randrange(len(raw))
        raw[at : at + chance.choice((0, 1, 1, 2, 700))] = chance.choice(
            (b'"', b"\\", b"\\ud83d", b"\xe5", b"\0", b"]", b"},{", b"[", b'":', b",", b"x", b"")
        )
        try:
            whole: Any = orjson.loads(raw)
        except orjson.JSONDecodeError as broken:
            whole = str(broken)
            with pytest.raises(InvalidRequest) as refused:
                parsed(bytes(raw))
            assert whole in str(refused.value) or "UTF-8" in str(refused.value)
        else:
            assert parsed(bytes(raw)) == whole
        outcomes.add(type(whole))
    assert outcomes == {dict, str}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_has_the_letters_of_its_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["x", TEXTS[name], "", *["some"] * 400]
    in_steps = pieces_of_texts(texts)
    monkeypatch.setattr(estimator, "_COUNTED_CHARS", 1_000_000)
    assert in_steps == pytest.approx(pieces_of_texts(texts), rel=0.05)


def test_what_lies_across_two_steps_is_found() -> None:
    for place in range(STEP_BYTES - 20, STEP_BYTES + 20):
        raw = b'{"%b":1,"\\u006dodel":"%b"}' % (b"x" * place, b"y" * STEP_BYTES)
        assert holds(raw, b"odel")
        assert not holds(raw, b"model")
        assert count_folded(raw.replace(b"odel", b"ODel"), b"none", b"odel") == 1
        assert has_escaped_key(raw)
        assert not has_escaped_key(raw.replace(b"\\u006d", b"\\u00e9"))


def test_the_cache_that_a_large_body_names_is_found() -> None:
    for cache, expected in (({"ttl": "1h"}, "1h"), ({"type": "ephemeral"}, "5m"), (None, None)):
        part = {"type": "text", "text": TEXTS["words"] + '"cache_control":'}
        body = chat([part | ({"cache_control": cache} if cache else {})])
        assert cache_write_of(orjson.dumps(body), body) == expected


def test_what_is_read_of_a_large_body_begins_its_conversation_by_the_ends_of_its_texts() -> None:
    """Its digests are taken on the event loop."""
    assert CHAT is not None
    text = TEXTS["words"] * 5
    openings = set()
    for first in (text, f"{text}.", f".{text}", text + text):
        turns = [{"role": "user", "content": first}]
        for later in ([], [{"role": "assistant", "content": text}]):
            body = chat("x") | {"messages": turns + later, "stream": True}
            read = read_body(ANYBODY, CHAT, orjson.dumps(body)).body
            assert read["stream"] is True
            openings.add((opening_of(read), conversation_of(read)))
            assert len(opening_of(read)) < len(first)
    assert len(openings) == 4


def test_long_texts_are_left_out_of_what_is_searched_for_names() -> None:
    text = TEXTS["quotes and escapes"] + "models and other models"
    raw = orjson.dumps(chat(text, file_id=text, end=text))
    read = skimmed(raw)
    assert read.body == orjson.loads(raw)
    assert orjson.loads(read.raw) == chat("~0", file_id="~1", end="~2")


def test_a_model_that_is_named_twice_beside_long_texts_is_found() -> None:
    assert CHAT is not None
    caller = replace(ANYBODY, models=("m",))
    raw = orjson.dumps(chat("a model, or more " * 200, fallbacks=["m"]))
    assert read_body(caller, CHAT, raw).asked.model == "m"
    twice = raw.replace(b'"fallbacks":', b'"fallbacks":["other"],"fallbacks":')
    with pytest.raises(InvalidRequest, match="fallbacks is named more than once"):
        read_body(caller, CHAT, twice)


def test_what_is_read_in_vain_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lists within each other, none of which can be divided where it is tried."""
    read: list[int] = []

    class Noting(Parser):
        def loads(self, raw: bytes) -> Any:
            read.append(len(raw))
            return super().loads(raw)

    part = b'{"a":[{"b":1},{"c":[{"d":2},{"e":3}]}]}'
    raw = b'{"a":' + b'[{"x":[1],"a":' * 200 + b'[{"y":1}, {"y":2}]' + b"}]" * 200
    raw += b',"b":[' + b",".join([part] * 200) + b"]}"
    monkeypatch.setattr(parsing, "orjson", Noting())
    assert parsed(raw) == orjson.loads(raw)
    assert sum(read) < 4 * parsing._MOST_SPENT * STEP_BYTES + 2 * len(raw)


def test_no_value_before_a_comma_is_no_list() -> None:
    for blanks in (1, STEP_BYTES, 3 * STEP_BYTES):
        with pytest.raises(InvalidRequest):
            parsed(b'{"a":[' + b" " * blanks + b",1" + b",2" * STEP_BYTES + b"]}")
