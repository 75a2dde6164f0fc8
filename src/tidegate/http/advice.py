"""What a person can do about a request that failed, by the code of its error. Pure.

Invariant: every code that can stand on record has its advice; a test goes through the tree.
"""

from __future__ import annotations

_TRY_ANEW = "Nothing is wrong with the request itself: retry it."

ADVICE: dict[str, str] = {
    "internal": "This is a fault of the gateway: its log has the details under the request's id.",
    "config": "A setting is wrong: the log of the process that had it names it.",
    "invalid_request": "The request can't be right as it is: its sender must change it.",
    "too_large": "It is larger than what is allowed: send less, or raise the limit on its size.",
    "files_full": "Its tenant keeps as much in files for batches as it may: delete some.",
    "unsupported_media": "A file is of a type that is not taken: convert it, or leave it out.",
    "fetch_refused": "The picture at its address could not, or must not, be fetched: check that "
    "the address is public and answers with a picture.",
    "request_timeout": "The client sent too slowly. It may send again.",
    "forbidden": "Its tenant may not ask for this: see what the tenant's models and keys allow.",
    "unauthenticated": "The key was not the right one: see the tenant's keys.",
    "not_found": "What it asks for is not served: check the model's name against the upstreams.",
    "method_not_allowed": "The path is asked by another method: its answer named which.",
    "policy_conflict": "A program's limits are not those in force: change one or the other.",
    "idempotency_conflict": "Its key stands for another request: its sender must use a new one.",
    "policy_changed": "Somebody else was quicker: look at what is in force, and change that.",
    "already_ended": "It had ended before.",
    "not_ended": "It has not ended yet.",
    "cancelled": "It was cancelled. Retry it if that was a mistake.",
    "too_many_followers": "This process had enough to follow. Asking again later helps.",
    "quota_exceeded": "Its tenant has as much queued or open as it may: raise that, or wait.",
    "budget_reserved": "Its tenant's other calls may spend what is left: ask again when they end.",
    "budget_exceeded": "Its tenant has spent its budget: raise it, or wait for the next period.",
    "admission": "The limiter did not let it in: see the limits.",
    "deadline_exceeded": "It was not let in before its deadline: raise the limit that it waited "
    "for, give it a higher priority or a later deadline.",
    "limit_paused": "A limit that it needs is paused for longer than it could wait: see who paused "
    "it and until when, then retry it or end the pause.",
    "limit_used_up": "A rate or day quota that it needs has no room before its deadline: raise it, "
    "give a later deadline, or retry it once there is room.",
    "impossible": "It asks for more than the limit can ever give: raise it, or ask for less.",
    "queue_full": "Too many were waiting already: send less at once, or allow more to wait.",
    "limiter_unavailable": "Valkey did not answer: see /health/dependencies, then retry it.",
    "lease_lost": f"The process that ran it lost touch with Valkey. {_TRY_ANEW}",
    "upstream": "The provider failed in a way of its own: its words are in the response.",
    "upstream_throttled": "The provider said that it is asked too much: lower the limit to what "
    "it really allows, then retry it.",
    "upstream_unavailable": f"The provider was down or not to be reached. {_TRY_ANEW}",
    "upstream_out": "The upstream had failed too often, so the call was not made: it is tried by "
    "one call at a time. Retry the request once the upstream is back.",
    "upstream_unpaid": "The account at the provider has no money left: top it up, then retry it.",
    "upstream_timeout": "The provider took too long: retry it, or allow it more time.",
    "upstream_rejected": "The provider refuses this very call, and would again: change it. Its "
    "words are in the response.",
    "upstream_unauthorized": "The provider does not take our key: put a key that works in place, "
    "then retry it.",
    "upstream_garbled": f"The provider's answer was not what its protocol says. {_TRY_ANEW}",
    "prompt_blocked": "The provider's safety filter refused the prompt: word it differently.",
    "empty_answer": "The provider answered without content: the finish reason says why. Allow "
    "more output tokens, or word it differently.",
    "store_unavailable": "PostgreSQL or the blob store did not answer: see /health/dependencies.",
    "claim_lost": "Another worker took it over; that one's word counts.",
    "shutting_down": f"The process that had it was stopping. {_TRY_ANEW}",
    "worker_died": "The workers that ran it died, each time: look at what it asks for and at the "
    "workers' logs before you requeue it.",
    "worker_lost": "The workers that ran it died, each time: look at what it asks for and at the "
    "workers' logs before you hand it in again.",
    "gateway_unreachable": "The gateway that was called did not answer: see whether it runs there.",
    "gateway_refused": "The gateway that was called said no: its words say why.",
    "client_left": "Its client went away before the answer was whole.",
    "client_stalled": "Its client stopped reading, and was cut off.",
}


def advice(code: str | None) -> str | None:
    """One or two sentences; None for a code that we do not know."""
    return None if code is None else ADVICE.get(code)
