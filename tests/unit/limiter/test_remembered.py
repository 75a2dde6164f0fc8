"""What a process remembers of its pool: the server's clock, as well as can be known."""

from __future__ import annotations

from tidegate.limiter.messages import Whole
from tidegate.limiter.policy import PoolPolicy
from tidegate.limiter.session import OFFSETS_KEPT, Remembered

POLICY = PoolPolicy({})


def told(now_ms: int) -> Whole:
    return Whole(now_ms, [], [], 0, 0, [], [], None, (1, []))


def test_a_moment_of_the_server_is_as_early_as_the_quickest_of_the_last_comparisons_allows() -> (
    None
):
    remembered = Remembered()
    assert remembered.here(1_000_005) == float("-inf")
    for at, took_ms in enumerate((3, 90, 2, 40)):
        sent_ms = at * 1000.0
        remembered.learn(
            told(1_000_000 + int(sent_ms) + took_ms),
            POLICY,
            sent_ms,
            sent_ms + 100,
            recovering=False,
        )
    assert remembered.here(1_000_012) == 10
    for _ in range(OFFSETS_KEPT):
        remembered.learn(told(1_010_009), POLICY, 10_000.0, 10_020.0, recovering=False)
    assert remembered.here(1_010_012) == 10_003


def test_another_epoch_may_have_another_clock() -> None:
    remembered = Remembered()
    remembered.learn(told(1_000_000), POLICY, 0.0, 1.0, recovering=False)
    remembered.forget_version()
    assert remembered.here(1_000_000) == float("-inf")


class Server:
    """Tells of two lists a page at a time, each from its beginning where no place is named."""

    def __init__(self, lists: dict[str, list[str]]) -> None:
        self.lists = lists

    def whole(self, places: dict[str, tuple[str, int]]) -> Whole:
        pages = {name: self.page(name, places.get(name, ("", 0))[1]) for name in self.lists}
        lapsing = [(member, 1000, "") for member in pages["lapsing"]]
        pauses = [(limit, 1000, 0, "by|me") for limit in pages["pauses"]]
        rest = {
            name: ("", places.get(name, ("", 0))[1] + 1)
            for name, page in pages.items()
            if len(page) == 1
        }
        return told(1_000_000)._replace(lapsing=lapsing, pauses=pauses, pages=rest)

    def page(self, name: str, at: int) -> list[str]:
        return self.lists[name][at : at + 1]


def compare(remembered: Remembered, server: Server, *, begin: bool) -> None:
    whole = server.whole(remembered.places(begin=begin))
    remembered.learn(whole, POLICY, 0.0, 1.0, recovering=False)


def test_two_lists_that_take_turns_at_their_last_pages_end() -> None:
    remembered = Remembered()
    server = Server({"lapsing": ["1|s|a"], "pauses": ["a"]})
    compare(remembered, server, begin=True)
    server.lists["lapsing"] += ["2|s|a"]  # one ends a page after the other
    compare(remembered, server, begin=False)
    server.lists["pauses"] += ["b"]  # both are as long: begun again by the other, none would end
    compare(remembered, server, begin=False)
    assert not remembered.pages, "nothing is left to be read"
    assert [member for member, *_ in remembered.lapsing(1.0)] == ["1|s|a", "2|s|a"]


def test_a_list_that_was_read_is_read_once_more_when_it_may_have_changed() -> None:
    remembered = Remembered()
    server = Server({"lapsing": ["1|s|a", "2|s|a"], "pauses": ["a"]})
    for number in range(2):
        compare(remembered, server, begin=number == 0)
    assert set(remembered.pages) == {"lapsing"}, "the pauses are read to their end"
    server.lists["pauses"] = ["b"]
    compare(remembered, server, begin=True)
    assert set(remembered.pages) == {"pauses"}
    compare(remembered, server, begin=False)
    assert not remembered.pages
    assert list(remembered.pauses) == ["b"]
