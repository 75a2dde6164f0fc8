"""What a file of prompts may hold, and what is told of one that can't be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tidegate.cli.batch import Line, Prompts, read
from tidegate.errors import ConfigError


def lines_of(tmp_path: Path, text: str, name: str = "p.jsonl", **more: Any) -> tuple[Line, ...]:
    return prompts_of(tmp_path, text, name, **more).lines


def prompts_of(
    tmp_path: Path,
    text: str,
    name: str = "p.jsonl",
    column: str | None = None,
    options: dict[str, Any] | None = None,
) -> Prompts:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read(path, column, options or {})


@pytest.mark.parametrize(
    ("line", "prompt_id", "fields"),
    [
        ("Plain words", "1", {"data": "Plain words"}),
        ('"A JSON text"', "1", {"data": "A JSON text"}),
        ('"Quoted" words', "1", {"data": '"Quoted" words'}),
        ("42", "1", {"data": "42"}),
        ('{"prompt": "p"}', "1", {"data": "p"}),
        ('{"data": "p", "id": 7}', "7", {"data": "p"}),
        ('{"data": "p \\ud83d\\ude00", "id": "\\ud83d\\ude00"}', "😀", {"data": "p 😀"}),
        ('{"text": "p", "custom_id": "x", "model": "m"}', "x", {"data": "p", "model": "m"}),
        (
            '{"custom_id": "x", "method": "POST", "url": "/v1/u", "body": {"a": 1}}',
            "x",
            {"endpoint": "/v1/u", "body": {"a": 1}},
        ),
    ],
)
def test_lines_of_every_shape(
    line: str, prompt_id: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    assert lines_of(tmp_path, f"{line}\n") == (Line(1, prompt_id, fields),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n \n", "at least one prompt"),
        ('ok\n{"prompt": "p"', "line 2: is broken JSON"),
        ("[1, 2]", "must be a text or an object"),
        ('{"question": "p"}', "must have a text as one of prompt, data, text"),
        ('{"prompt": "p", "modle": "m"}', "has 'modle'"),
        ('{"prompt": "p", "id": 1}\n{"prompt": "q", "id": 1}', "has the id '1' of line 1"),
        ('ok\n{"prompt": "p", "id": "a\\ud83d"}', "line 2: has half a surrogate pair"),
        ('"a \\uDE00"', "line 1: has half a surrogate pair"),
    ],
)
def test_a_mistake_is_told_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as wrong:
        prompts_of(tmp_path, text)
    assert said in str(wrong.value)


def test_tables_have_a_column_of_prompts(tmp_path: Path) -> None:
    text = 'id,prompt,model,note\na,"Two\nlines",m,x\nb,One,,y\n'
    assert lines_of(tmp_path, text, "p.csv") == (
        Line(1, "a", {"model": "m", "data": "Two\nlines"}),
        Line(2, "b", {"data": "One"}),
    )
    tabs = lines_of(tmp_path, "question\nWhy?\n", "p.tsv", column="question")
    assert tabs == (Line(1, "1", {"data": "Why?"}),)
    with pytest.raises(ConfigError, match=r"--column=question: needs a file \.csv"):
        lines_of(tmp_path, "question\nWhy?\n", "p.txt", column="question")
    for column in (None, "nothing"):
        with pytest.raises(ConfigError, match="--column"):
            lines_of(tmp_path, "question\nWhy?\n", "p.csv", column=column)
    with pytest.raises(ConfigError, match="row 1"):
        lines_of(tmp_path, "prompt,x\n,1\n", "p.csv")


def test_options_are_for_lines_that_do_not_say_otherwise(tmp_path: Path) -> None:
    options = {"model": "usual", "priority": -100}
    plain, own, native = lines_of(
        tmp_path,
        'a\n{"prompt": "b", "model": "own"}\n{"url": "/v1/u", "body": {}}\n',
        options=options,
    )
    assert plain.fields == {"data": "a", **options}
    assert own.fields == {"data": "b", "model": "own", "priority": -100}
    assert native.fields == {"endpoint": "/v1/u", "body": {}, "priority": -100}


def test_tiers_and_deadline_hold_for_native_calls_too(tmp_path: Path) -> None:
    options = {"model": "m", "deadline_ms": 9, "tiers": ["flex"]}
    (native,) = lines_of(tmp_path, '{"url": "/v1/u", "body": {}}', options=options)
    body = {"endpoint": "/v1/u", "body": {}}
    assert native.fields == {"deadline_ms": 9, "tiers": ["flex"], **body}
    with_tiers = prompts_of(tmp_path, "a", options=options)
    assert with_tiers.lines[0].fields["tiers"] == ["flex"]


def test_keys_differ_by_line_content_options_and_retries(tmp_path: Path) -> None:
    first = prompts_of(tmp_path, "a\nb\n")
    same = prompts_of(tmp_path, "a\r\nb")
    changed = prompts_of(tmp_path, "a\nc\n")
    other = prompts_of(tmp_path, "a\nb\n", options={"model": "m"})
    moved = prompts_of(tmp_path, "\na\nb\n")
    named = prompts_of(tmp_path, '{"id": "x", "data": "a"}\nb\n')
    every = (first, same, changed, other, moved, named)
    keys = [one.key(one.lines[0], 0) for one in every]
    assert keys[0] == keys[1]
    assert len({one.digest for one in every}) == 5
    assert len({first.key(line, tries) for line in first.lines for tries in (0, 1)}) == 4
    assert all(key.isascii() and len(key) <= 255 for key in keys)
