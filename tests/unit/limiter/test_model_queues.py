"""The queues of the executable model."""

from __future__ import annotations

from tidegate.limiter.model.state import FlowName, SessionQueue


def test_tickets_are_in_the_order_of_their_stamps() -> None:
    """Those of a process that joins again keep their stamps, in whatever order it names them."""
    queue = SessionQueue("s1", "2|acme|kind:a", FlowName(2, "acme", ("kind:a",)))
    for member, stamp in (("8|", 4), ("12|", 1), ("9|", 5), ("13|", 2), ("15|", 4), ("16|", 1.5)):
        queue.add(member, stamp)
    in_order = [("12|", 1), ("16|", 1.5), ("13|", 2), ("15|", 4), ("8|", 4), ("9|", 5)]
    assert list(queue.tickets.items()) == in_order
    assert queue.first() == ("12|", 1)
