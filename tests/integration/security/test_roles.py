"""Roles of who operates: what each opens, and how a refusal reads."""

from __future__ import annotations

import re
from typing import Any

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import ask, submitted
from tests.waiting import wait_until
from tidegate.call import OperatorRole, Scope
from tidegate.http.guards import BODY_ROUTES, ROLES

NO_ID = "00000000-0000-7000-8000-000000000000"
LIVE_FEED = "/dashboard/feed"


async def as_role(gateway: Gateway, role: OperatorRole) -> dict[str, str]:
    tenants = gateway.services.store.tenants
    _, made = await tenants.create_key("default", scopes=[Scope(role.value)])
    return {"Authorization": f"Bearer {made.text}"}


async def test_each_role_opens_what_is_its_own_and_a_refusal_names_the_one_that_is_needed(
    open_gateway: Opener,
) -> None:
    for settings in ({}, {"auth": "on"}):
        gateway = await open_gateway(worker=False, **settings)
        for role in OperatorRole:
            headers = await as_role(gateway, role)
            for path, methods in ROLES.items():
                if path == LIVE_FEED or (settings and not path.startswith(("/admin", "/dash"))):
                    continue
                url = gateway.url + re.sub(r"\{.*?\}", NO_ID, path)
                for method, needed in methods.items():
                    if role.includes(needed) and method != "GET":
                        continue  # what changes something has tests of its own
                    async with gateway.http.request(method, url, headers=headers) as answer:
                        text = await answer.text()
                        is_body = path in BODY_ROUTES
                        if role.includes(needed) and not (is_body and role is OperatorRole.VIEWER):
                            assert answer.status not in (401, 403), (role, method, path, text)
                        else:
                            assert answer.status == 403, (role, method, path, text)
                            wanted = OperatorRole.OPERATOR if is_body else needed
                            assert f"this needs the role {wanted}" in text
                            assert f"has the role {role}" in text


async def test_a_key_is_made_with_a_role_by_admins_alone(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    operator_key = {"Authorization": f"Bearer {gateway.operator_key}"}
    status, made = await ask(gateway, "POST", "/admin/keys", operator_key, {"role": "operator"})
    assert (status, made["scopes"], made["role"]) == (201, ["operator"], "operator")
    operator = {"Authorization": f"Bearer {made['key']}"}
    pause = "/admin/limits/kind:text_only/pause"
    assert (await ask(gateway, "POST", pause, operator, {"for_ms": 1}))[0] == 200
    for body in ({"role": "viewer"}, {"scopes": ["admin"]}, {}):
        status, problem = await ask(gateway, "POST", "/admin/keys", operator, body)
        assert (status, problem["allowed"]) == (403, "admin")
    requeue = {"since": "2026-01-01T00:00:00Z", "dry_run": False}
    viewer = await as_role(gateway, OperatorRole.VIEWER)
    for dry_run, code in ((True, 200), (False, 403)):
        order = requeue | {"dry_run": dry_run}
        assert (await ask(gateway, "POST", "/admin/requests/requeue", viewer, order))[0] == code
    status, session = await ask(gateway, "GET", "/dashboard/session", operator)
    assert (status, session["role"], session["reads_bodies"]) == (200, "operator", True)
    status, shown = await ask(gateway, "GET", "/dashboard/session", operator_key)
    assert shown["role"] == "admin"


async def test_a_viewer_sees_no_prompt_and_no_secret_unless_a_setting_says_so(
    open_gateway: Opener,
) -> None:
    for opened in (False, True):
        gateway = await open_gateway(
            viewers_read_bodies=opened, webhook_secret="whsec_" + "A" * 32, auth="on"
        )
        caller = {"Authorization": f"Bearer {gateway.operator_key}"}
        tenants = gateway.services.store.tenants
        _, made = await tenants.create_key("default")
        caller = {"Authorization": f"Bearer {made.text}"}
        secret = "Explain the tide of Oostende"
        request_id = await submitted(gateway, caller, data=secret)

        async def has_ended() -> bool:
            status, found = await ask(gateway, "GET", f"/status/{request_id}", caller)  # noqa: B023
            return status == 200 and found["status"] == "succeeded"

        await wait_until(has_ended, 20, "its end")
        viewer, operator = [await as_role(gateway, role) for role in list(OperatorRole)[:2]]
        path = f"/admin/requests/{request_id}"
        status, found = await ask(gateway, "GET", path, viewer)
        assert status == 200
        assert found["request"]["status"] == "succeeded"
        assert (secret in str(found)) is opened
        assert ("text" in found["request"]) is opened
        assert secret in str((await ask(gateway, "GET", path, operator))[1])
        for who, finds in ((viewer, opened), (operator, True)):
            status, page = await ask(gateway, "GET", "/admin/requests?text=oostende", who)
            assert (status, bool(page["items"])) == (200, finds)
        for role in ("request", "response"):
            status, answer = await ask(gateway, "GET", f"{path}/{role}", viewer)
            assert status == (200 if opened else 403)
            if not opened:
                assert "VIEWERS_READ_BODIES" in answer["detail"]
        await tenants.set("acme", {}, by="test")
        tenant: dict[str, Any] = (await ask(gateway, "GET", "/admin/tenants/acme", viewer))[1]
        assert tenant["webhook_secret"] is None
