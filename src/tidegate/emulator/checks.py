"""Checks of single values in JSON that sets the emulator: numbers within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.errors import InvalidRequest


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a number within bounds; raises InvalidRequest naming the field."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(name, f"{name}: {value!r} is not a number from {low:g} to {high:g}")
    return value


def whole(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int within bounds; raises InvalidRequest naming the field."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(name, f"{name}: {value!r} is not a whole number from {low} to {high}")
    return value


def known_fields(name: str, table: Any, allowed: tuple[str, ...]) -> None:
    """Raises InvalidRequest unless `table` is an object with none but these fields."""
    if not isinstance(table, Mapping):
        raise InvalidRequest(name, f"{name}: {table!r} is not an object")
    if unknown := set(table) - set(allowed):
        raise InvalidRequest(name, f"{name}: {min(unknown)!r} is none of {', '.join(allowed)}")
