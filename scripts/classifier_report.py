"""How good the classifier is: accuracy, precision, recall and confusion, per language and split.

    python scripts/classifier_report.py [--split dev|fresh|heldout] [--rules] [--show-heldout]

Of the held-out split only counts are shown, so that nobody fits rules to it by accident.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tidegate.call import Classification, Kind
from tidegate.classify import by_keywords, by_rules

DATA = Path(__file__).parent.parent / "tests" / "data"
SPLITS = ("dev", "fresh", "fresh2", "fresh3", "fresh4", "fresh5", "heldout")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled prompt."""

    prompt: str
    files: tuple[str, ...]
    expected: Kind
    language: str


@dataclass(frozen=True, slots=True)
class Judged:
    """An example with both answers."""

    example: Example
    keywords: Classification
    rules: Classification


def load(split: str) -> list[Example]:
    """The examples of a split; an empty list when it has no file."""
    path = DATA / f"prompts_{split}.jsonl"
    if not path.exists():
        return []
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            kind = Kind(row["expected"])
            examples.append(Example(row["prompt"], tuple(row["files"]), kind, row["language"]))
    return examples


def judge(examples: list[Example]) -> list[Judged]:
    return [
        Judged(e, by_keywords(e.prompt, e.files), by_rules(e.prompt, e.files)) for e in examples
    ]


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def kinds_table(title: str, judged: list[Judged]) -> Table:
    """Precision and recall of each kind, and what it was taken for."""
    table = Table("expected", "prompts", "precision", "recall", *[f"as {k}" for k in Kind])
    table.title = title
    confusion = Counter((j.example.expected, j.keywords.kind) for j in judged)
    for kind in Kind:
        whole = sum(confusion[kind, given] for given in Kind)
        given = sum(confusion[expected, kind] for expected in Kind)
        right = confusion[kind, kind]
        row = [str(confusion[kind, other]) for other in Kind]
        table.add_row(kind, str(whole), share(right, given), share(right, whole), *row)
    return table


def languages_table(title: str, judged: list[Judged]) -> Table:
    table = Table("language", "prompts", "right", "accuracy", "rules decide", "rules wrong")
    table.title = title
    groups: defaultdict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        groups[one.example.language].append(one)
    for language, group in [*sorted(groups.items()), ("all", judged)]:
        right = sum(j.keywords.kind is j.example.expected for j in group)
        decided = [j for j in group if j.rules.kind is not None]
        wrong = sum(j.rules.kind is not j.example.expected for j in decided)
        table.add_row(
            language,
            str(len(group)),
            str(right),
            share(right, len(group)),
            share(len(decided), len(group)),
            str(wrong),
        )
    return table


def show_wrong(console: Console, judged: list[Judged], *, rules: bool) -> None:
    for one in judged:
        answer = one.rules if rules else one.keywords
        if answer.kind is None or answer.kind is one.example.expected:
            continue
        files = " ".join(one.example.files)
        console.print(
            f"{one.example.language}: expected {one.example.expected}, got {answer.kind}"
            f" ({answer.reason}): {one.example.prompt[:140]!r} {files}",
            markup=False,
            soft_wrap=True,
            highlight=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, action="append")
    parser.add_argument("--rules", action="store_true", help="list the wrong answers of the rules")
    parser.add_argument("--show-heldout", action="store_true")
    options = parser.parse_args()
    console = Console(width=120)
    for split in options.split or SPLITS:
        judged = judge(load(split))
        if not judged:
            console.print(f"{split}: no prompts")
            continue
        console.print(kinds_table(f"{split}: kinds (keywords)", judged))
        console.print(languages_table(f"{split}: languages", judged))
        if split != "heldout" or options.show_heldout:
            show_wrong(console, judged, rules=options.rules)


if __name__ == "__main__":
    main()
