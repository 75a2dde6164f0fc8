"""Which upstreams can take a request, in the order in which they are to be tried. Pure.

Invariant: the same request finds the same set of targets in every process; only the order among
equals is drawn by lot, by weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from random import Random

from tidegate.errors import NotFound
from tidegate.policy.upstreams import Deployment, Upstream
from tidegate.relay.paths import Dialect

_MODELS_KEPT = 1_000
_PATTERN = frozenset("*?[")  # as fnmatch reads them


@dataclass(frozen=True, slots=True)
class Target:
    """An upstream, and the model's name there."""

    upstream: Upstream
    model: str


class Targets:
    """One per process."""

    def __init__(self, deployment: Deployment, random: Random | None = None) -> None:
        self.upstreams = {one.name: one for one in deployment.upstreams}
        self._routes = deployment.routes
        self._random = random or Random()
        # The targets of a model, and whether their order is drawn.
        self._known: dict[tuple[Dialect, str], tuple[list[Target], bool]] = {}

    def of(self, dialect: Dialect, model: str) -> list[Target]:
        """The chain for a model. Raises NotFound where nobody serves it in that dialect."""
        known = self._known.get((dialect, model))
        if known is None:
            plain = model.removeprefix("models/")
            routed = self._routed(dialect, plain)
            known = (self._best(dialect, plain), True) if routed is None else (routed, False)
            if not known[0]:
                what = f"serves the model {model!r}" if model else "takes a call without a model"
                raise NotFound(f"no upstream {what} in the {dialect} dialect", field="model")
            if len(self._known) < _MODELS_KEPT:
                self._known[dialect, model] = known
        found, by_lot = known
        return self._drawn(found) if by_lot else list(found)

    def speaking(self, dialect: Dialect) -> list[Upstream]:
        """All upstreams of a dialect, in the order of the file."""
        return [one for one in self.upstreams.values() if dialect in one.base_urls]

    def named_by_routes(self, dialect: Dialect) -> dict[str, Target]:
        """The models that have a name by a route alone, and who is asked first for each. Routes
        that are patterns name none."""
        found: dict[str, Target] = {}
        for route in self._routes:
            if not _PATTERN.intersection(route.model):
                targets = self._routed(dialect, route.model)
                if targets:
                    found[route.model] = targets[0]
        return found

    def _routed(self, dialect: Dialect, model: str) -> list[Target] | None:
        for route in self._routes:
            if fnmatchcase(model, route.model):
                named = ((self.upstreams[name], of_it) for name, of_it in route.targets)
                return [
                    Target(upstream, of_it or upstream.aliases.get(model, model))
                    for upstream, of_it in named
                    if dialect in upstream.base_urls
                ]
        return None

    def _best(self, dialect: Dialect, model: str) -> list[Target]:
        """Those that name the model; those that take any only where nobody does."""
        fits = [(one.fit(model), one) for one in self.speaking(dialect)]
        named = [one for fit, one in fits if fit > 1]
        return [
            Target(one, one.aliases.get(model, model))
            for one in named or [one for fit, one in fits if fit]
        ]

    def _drawn(self, targets: Sequence[Target]) -> list[Target]:
        """By lot, each place by weight among those that are left."""
        if len(targets) < 2:
            return list(targets)
        # Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.
        keys = [
            (self._random.random() ** (1 / target.upstream.weight), place)
            for place, target in enumerate(targets)
        ]
        return [targets[place] for _, place in sorted(keys, reverse=True)]
