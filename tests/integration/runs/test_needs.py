"""What a test needs is found in the code that it can reach."""

from __future__ import annotations

from pathlib import Path

from tests.fleet import Fleet
from tests.needs import STORES, starts
from tests.product import started
from tidegate.embedded.servers import ValkeyServer

ROOT = Path(__file__).parents[3]


def _through_another() -> Fleet:
    return Fleet(ROOT)


def test_what_a_test_needs_is_found_through_all_that_it_calls() -> None:
    def starts_valkey() -> None:
        ValkeyServer(ROOT).start()

    def starts_a_deployment() -> None:
        with started(ROOT):
            pass

    def starts_it_elsewhere() -> None:
        [_through_another() for _ in range(3)]

    def starts_nothing() -> ValkeyServer:
        raise NotImplementedError

    assert starts(starts_valkey) == {"valkey"}
    assert starts(starts_a_deployment) == STORES
    assert starts(starts_it_elsewhere) == STORES
    assert starts(starts_nothing) == set()
