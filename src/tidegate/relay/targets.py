"""Which upstreams can take a request, in the order in which they are to be tried. Pure.

Invariant: the same request finds the same set of targets in every process; only the order among
equals is drawn by lot, by weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from random import Random

from tidegate.call import DEFAULT_POOL
from tidegate.errors import InvalidRequest, NotFound
from tidegate.policy.upstreams import Deployment, Upstream
from tidegate.relay.paths import Dialect

_MODELS_KEPT = 1_000
_PATTERN = frozenset("*?[")  # as fnmatch reads them
_MOST_NAMED = 8  # upstreams, and patterns of each, in a refusal
_CALLS = {
    Dialect.OPENAI: "POST /v1/chat/completions",
    Dialect.ANTHROPIC: "POST /v1/messages",
    Dialect.GEMINI: "POST /v1beta/models/MODEL:generateContent",
}


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
        self._for_prompts: set[str] = set()

    def of(self, dialect: Dialect, model: str) -> list[Target]:
        """The chain for a model. Raises NotFound where nobody serves it in that dialect."""
        known = self._known.get((dialect, model))
        if known is None:
            plain = model.removeprefix("models/")
            routed = self._routed(plain)
            if routed is not None:
                known = ([one for one in routed if dialect in one.upstream.base_urls], False)
            elif plain:
                known = (self._best(plain, self.speaking(dialect)), True)
            else:
                known = (self._without_model(dialect), True)
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
                targets = self._routed(route.model) or []
                speaking = (one for one in targets if dialect in one.upstream.base_urls)
                if (first := next(speaking, None)) is not None:
                    found[route.model] = first
        return found

    def check_prompt(self, model: str) -> None:
        """Raise InvalidRequest where a prompt (of `/submit` or `/stream`) for `model` would be for
        another upstream than the account of Gemini, which alone answers prompts."""
        if model in self._for_prompts:
            return
        plain = model.removeprefix("models/")
        own = self.upstreams.get(DEFAULT_POOL)
        routed = self._routed(plain)
        found = self._best(plain, self.upstreams.values()) if routed is None else routed
        if any(one.upstream is own and one.model == plain for one in found):
            if len(self._for_prompts) < _MODELS_KEPT:
                self._for_prompts.add(model)
            return
        instead = [one.upstream for one in found] or list(self.upstreams.values())
        calls = dict.fromkeys(_CALLS[_first_dialect(one)] for one in instead)
        call = f"call {' or '.join(calls)}, or submit that call as `endpoint` and `body`"
        if own is None:
            said = f"a prompt needs the account of GEMINI_API_KEY, and that is not set: {call}"
            raise InvalidRequest("model", said, allowed=_served(self.upstreams.values()))
        if not found:
            said = f"no upstream serves the model {model!r}"
        elif found[0].upstream is own:
            said = f"{model!r} is a name for native calls; a prompt names {found[0].model!r}"
        else:
            said = f"the model {model!r} is served by the upstream {found[0].upstream.name!r}"
            said += f", which a prompt can't reach: {call}"
        raise InvalidRequest("model", said, allowed=_served([own]))

    def pools_for(self, model: str) -> list[str]:
        """The pools whose limits a model meets, by its name at the provider."""
        found = {one.upstream.pool for one in self._best(model, self.upstreams.values())}
        for route in self._routes:
            of_route = (route.model,) if not _PATTERN.intersection(route.model) else ()
            for target in (one for named in of_route for one in self._routed(named) or ()):
                found |= {target.upstream.pool} if target.model == model else set()
        found |= {one.pool for one in self.upstreams.values() if model in one.aliases.values()}
        return [one.pool for one in self.upstreams.values() if one.pool in found]

    def _routed(self, model: str) -> list[Target] | None:
        for route in self._routes:
            if fnmatchcase(model, route.model):
                named = ((self.upstreams[name], of_it) for name, of_it in route.targets)
                return [
                    Target(upstream, of_it or upstream.aliases.get(model, model))
                    for upstream, of_it in named
                ]
        return None

    def _without_model(self, dialect: Dialect) -> list[Target]:
        """For a call that leaves its model to the provider: those whose own dialect it is, and that
        take any model, come first."""
        speaking = self.speaking(dialect)
        own = [one for one in speaking if _first_dialect(one) is dialect] or speaking
        return [Target(one, "") for one in [one for one in own if one.fit("")] or own]

    def _best(self, model: str, upstreams: Iterable[Upstream]) -> list[Target]:
        """Those that name the model; those that take any only where nobody does."""
        fits = [(one.fit(model), one) for one in upstreams]
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


def _first_dialect(upstream: Upstream) -> Dialect:
    return Dialect(next(iter(upstream.base_urls)))


def _served(upstreams: Iterable[Upstream]) -> str:
    """Which models there are, for people."""
    return "; ".join(
        f"{one.name}: {', '.join(one.models[:_MOST_NAMED])}"
        for one in list(upstreams)[:_MOST_NAMED]
    )
