"""Flags in the help: `--json`, not `--json <bool>`, since a flag takes no value."""

from __future__ import annotations

from typing import Any

from typer.core import TyperOption


def show_flags_without_type() -> None:
    """Typer names the type of every option since it renders types itself; earlier versions name
    none for a flag."""
    shown = getattr(TyperOption, "display_type_rich", None)
    if shown is None:
        return

    def of_options_with_a_value(option: Any, ctx: Any) -> str | None:
        if getattr(option, "is_flag", False) and option.metavar is None:
            return None
        text: str | None = shown(option, ctx=ctx)
        return text

    TyperOption.display_type_rich = of_options_with_a_value  # type: ignore[method-assign,assignment]
