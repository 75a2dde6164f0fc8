"""What a process has spent counts until the totals certainly hold it."""

from __future__ import annotations

from tidegate.call import Charge, Usage, UsageState, new_id
from tidegate.store.usage import Spending

ONE = Charge(UsageState.TOLD, Usage(3, 4, 5), None, 700)


def test_a_charge_counts_until_totals_that_were_read_after_its_writing_are_known() -> None:
    spending, first, second = Spending(), new_id(), new_id()
    spending.settle(first, "a", ONE)
    spending.settle(second, "b", ONE)
    assert (spending.of("a"), spending.of("b")) == ((700, 12), (700, 12))
    spending.begin()
    spending.written([first])  # in the middle of a look: not certainly in it
    spending.end()
    assert spending.of("a") == (700, 12)
    spending.begin()
    assert spending.of("a") == (700, 12)
    spending.end()
    assert (spending.of("a"), spending.of("b")) == ((0, 0), (700, 12))


def test_a_look_that_fails_loses_nothing() -> None:
    spending, one = Spending(), new_id()
    spending.settle(one, "a", ONE)
    spending.written([str(one), str(new_id())])
    spending.begin()
    assert spending.of("a") == (700, 12)
    spending.begin()
    spending.end()
    assert spending.of("a") == (0, 0)


def test_an_unknown_charge_counts_for_nothing() -> None:
    spending = Spending()
    spending.settle(new_id(), "a", Charge(UsageState.UNKNOWN, Usage(), None, None))
    assert spending.of("a") == (0, 0)


def test_what_is_reserved_counts_until_it_is_settled_for_what_it_cost() -> None:
    spending, first, second = Spending(), new_id(), new_id()
    spending.reserve(first, "a", 1_000, 20)
    spending.reserve(second, "a", 1_000, 20)
    spending.reserve(first, "a", 500, 10)  # another try, by another price
    assert (spending.reserved("a"), spending.of("a")) == ((1_500, 30), (0, 0))
    spending.settle(first, "a", ONE)
    assert (spending.reserved("a"), spending.of("a")) == ((1_000, 20), (700, 12))
    spending.settle(first, "a", ONE)  # of the same request, once
    assert spending.of("a") == (700, 12)
    spending.forget(first)
    spending.settle(second, "a", Charge())
    assert (spending.reserved("a"), spending.of("a")) == ((0, 0), (0, 0))
