"""`tidegate limits`, `why` and `permits` against a running deployment, as a person runs them."""

from __future__ import annotations

import asyncio
import re

from tests.commands import tidegate
from tests.gateway import Gateway, Opener
from tests.waiting import wait_until


async def on_record(gateway: Gateway) -> None:
    async def is_there() -> bool:
        return bool(await gateway.services.keeper.history(1))

    await wait_until(is_there, 20, "the first revision")


async def test_limits_are_set_shown_and_told_apart_in_the_history(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await on_record(gateway)
    done = await tidegate(
        *(gateway, "limits", "set", "kind:text_only=9", "rpm:total={bound=600, slack_ms=900}"),
        *("weights.acme=4", "--reason", "more quota"),
    )
    assert (done.code, done.complained) == (0, "")
    told = done.said.splitlines()
    assert (told[0], told[1]) == ("revision 2 is in force", "  limits.kind:text_only: 5 -> 9")
    assert told[-1] == "  weights.acme: none -> 4"
    await wait_until(lambda: gateway.services.limiter.policy.revision == 2, 20, "in force here")
    policy = gateway.services.limiter.policy
    assert (policy.bound("kind:text_only"), policy.weights) == (9, {"acme": 4})

    shown = await tidegate(gateway, "limits", "show")
    assert shown.code == 0
    assert "Revision 2, live, set by " in shown.said
    assert ": more quota" in shown.said
    assert "1 process in the pool gemini" in shown.said
    assert "rpm:total" in shown.said
    assert "600 requests a minute" in shown.said
    assert "\x1b[" not in shown.said, "plain text where there is no terminal"

    as_json = (await tidegate(gateway, "limits", "show", "--json")).json
    assert as_json["in_force"]["revision"] == 2
    assert as_json["policy"]["limits"]["rpm:total"] == {"bound": 600, "slack_ms": 900}

    history = await tidegate(gateway, "limits", "history", "--limit", "1")
    assert "limits.kind:text_only: 5 -> 9" in history.said
    assert "more quota" in history.said
    rows = (await tidegate(gateway, "limits", "history", "--json", "--limit", "1")).json
    assert [(row["revision"], row["origin"]) for row in rows] == [(2, "live")]
    assert "@" in rows[0]["set_by"]


async def test_a_limit_that_no_call_of_its_pool_meets_is_told_where_it_belongs(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await on_record(gateway)
    key = {"OPENAI_API_KEY": "k"}  # makes the upstream
    changes = ("rpm:gpt-5-mini=100", "rpm:gemini-2.5-pro=9", "rpm:tenant/acme=9", "weights.a=2")
    done = await tidegate(gateway, "limits", "set", *changes, **key)
    assert done.code == 0
    assert done.complained == (
        "tidegate: warning: rpm:gpt-5-mini: no upstream in the pool 'gemini' serves 'gpt-5-mini'; "
        "did you mean --pool openai?\n"
    )
    behind = await tidegate(gateway, "limits", "set", changes[0], "--pool", "openai", **key)
    assert (behind.code, behind.complained) == (0, "")
    shown = await tidegate(gateway, "limits", "show", "--json", "--pool", "openai", **key)
    assert shown.json["policy"]["limits"] == {
        "pool:total": 64,
        # As its provider's preset counts.
        "rpm:gpt-5-mini": {"bound": 100, "pace_ms": 10_000, "shape": "bucket"},
    }


async def test_the_deployments_own_policy_can_be_put_back(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await on_record(gateway)
    assert (await tidegate(gateway, "limits", "set", "kind:text_only=9")).code == 0
    (gateway.config.data_dir.parent / "tidegate.toml").write_text('[limits]\n"model:m" = 3\n')
    done = await tidegate(gateway, "limits", "set", "--deployed", "--json")
    assert done.code == 0
    assert done.json["policy"]["limits"] == {
        "kind:classifier": 2,
        "kind:image_generation": 2,
        "kind:multi_modal": 3,
        "kind:text_only": 5,
        "model:m": 3,
    }
    newest = (await gateway.services.keeper.history(1))[0]
    assert (newest.revision, newest.origin) == (3, "deployment")
    removed = await tidegate(gateway, "limits", "set", "--remove", "model:m")
    assert removed.said == "revision 4 is in force\n  limits.model:m: 3 -> none\n"


async def test_a_paused_limit_is_explained_and_resumed(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    paused = await tidegate(
        *(gateway, "limits", "pause", "kind:text_only", "--for", "2h", "--reason", "it is ill")
    )
    assert (paused.code, paused.said) == (0, "kind:text_only is paused for 2h\n")
    again = await tidegate(gateway, "limits", "pause", "kind:text_only", "--for", "1m")
    assert again.said == "kind:text_only is paused already, and for longer\n"
    assert "it is ill, for " in (await tidegate(gateway, "limits", "show")).said
    request_id = await gateway.submit(data="Explain", type="text_only")

    async def queued() -> bool:
        return bool((await gateway.services.limiter.snapshot()).queues)

    await wait_until(queued, 20, "the job at the limit")
    why = await tidegate(gateway, "why", request_id)
    assert why.code == 0
    assert why.said.startswith(f"{request_id} waits for kind:text_only, which is paused by ")
    shown = (await tidegate(gateway, "limits", "show")).said
    assert re.search(r"^ kind:text_only .* waiting: default 1; paused by ", shown, re.MULTILINE)
    for part in (request_id[:18], request_id[-6:]):
        said = (await tidegate(gateway, "why", part)).said
        assert said.startswith(f"{request_id} waits for kind:text_only, which is paused by ")
    unknown = await tidegate(gateway, "why", "ffff0000")
    assert (unknown.code, "neither the beginning" in unknown.complained) == (1, True)
    ticket = (await tidegate(gateway, "limits", "show", "--json")).json["queues"][0]
    place = f"{ticket['process']}/{ticket['first_ticket']}"
    assert "it is ill" in (await tidegate(gateway, "why", place, "--json")).json["sentence"]
    resumed = await tidegate(gateway, "limits", "resume", "kind:text_only")
    assert resumed.said == "kind:text_only is resumed\n"
    assert (await gateway.end_of(request_id))["status"] == "succeeded"
    assert "was not paused" in (await tidegate(gateway, "limits", "resume", "kind:text_only")).said


async def test_permits_are_listed_and_a_dead_process_is_revoked(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    assert (await tidegate(gateway, "permits", "list")).said == "no permit is in use\n"
    await gateway.upstream.set_fault("hang", count=1)
    request_id = await gateway.submit(data="Explain", type="text_only")
    await gateway.in_flight(1)

    async def named() -> bool:
        calls = await gateway.services.store.running_calls.calls("gemini")
        return bool(calls)

    await wait_until(named, 20, "the attempt on record")
    listed = await tidegate(gateway, "permits", "list")
    assert request_id in listed.said
    permit = (await tidegate(gateway, "permits", "list", "--json")).json[0]
    assert permit["request_id"] == request_id
    unsure = await tidegate(gateway, "permits", "revoke", permit["process"])
    assert unsure.code == 1, "asked, nobody said yes"
    revoked = await tidegate(gateway, "permits", "revoke", permit["process"], "--yes")
    assert (revoked.code, revoked.said) == (0, f"1 session of {permit['process']} ended\n")
    assert (await gateway.end_of(request_id))["status"] == "succeeded"


MISTAKES: dict[tuple[str, ...], tuple[int, str]] = {
    ("limits", "set"): (2, "needs either changes, such as"),
    ("limits", "set", "kind:text_only=five"): (2, "a whole number or a table"),
    ("limits", "set", "--remove", "rpm:x"): (1, "there is no limits.rpm:x"),
    ("limits", "pause", "rpm:x"): (1, "there is no limit rpm:x"),
    ("why", "01a20eee-3651-7845-959b-24c31459d2c4"): (1, "on record"),
    ("permits", "revoke", "nobody", "--yes"): (1, "no process nobody"),
}


async def test_mistakes_are_told_in_one_line(open_gateway: Opener) -> None:
    # The lease is one that six commands can begin in beside one another.
    gateway = await open_gateway(worker=False, semaphore_timeout=15.0)
    all_done = await asyncio.gather(*(tidegate(gateway, *arguments) for arguments in MISTAKES))
    for done, (arguments, (code, said)) in zip(all_done, MISTAKES.items(), strict=True):
        assert (done.code, done.said) == (code, ""), (arguments, done.complained)
        assert done.complained.startswith("tidegate: ")
        assert said in done.complained
        assert done.complained.count("\n") == 1
    assert gateway.services.limiter.policy.revision == 1


async def test_without_valkey_a_command_says_so_soon(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    done = await tidegate(gateway, "limits", "show", REDIS_URL="redis://127.0.0.1:1")
    assert (done.code, done.said) == (4, "")
    assert done.complained.startswith("tidegate: ")
    assert done.complained.count("\n") == 1
