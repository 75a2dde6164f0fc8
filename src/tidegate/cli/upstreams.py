"""Commands on the upstreams of a running deployment: `tidegate upstreams`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from tidegate.cli.client import with_gateway
from tidegate.cli.limits import parsed, span_ms
from tidegate.cli.terminal import (
    FAILED,
    Json,
    Reason,
    counted,
    given,
    legible,
    show_json,
    show_table,
    who,
)
from tidegate.errors import ConfigError, UpstreamsChanged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidegate.cli.client import GatewayClient

app = typer.Typer(
    help="List, add, change, test, drain and remove upstreams of the running deployment.",
    no_args_is_help=True,
)

_POLL_S = 0.5
_MOST_SHOWN = 4
Name = Annotated[str, typer.Argument(help="An upstream's name, such as groq.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")]
Expect = Annotated[
    int | None,
    typer.Option(help="Change nothing unless this revision is in force.", metavar="REV"),
]
Keys = Annotated[
    list[str] | None,
    typer.Argument(
        help="A key of the upstream's table and a value, as in tidegate.toml; aliases.fast "
        "is one alias.",
        metavar="KEY=VALUE",
    ),
]


@app.command("list")
def list_(json: Json = False) -> None:
    """List all upstreams with their state and where each is defined."""
    found = _call("GET")
    if json:
        show_json(found)
        return
    changed = f"revision {found['revision']}" if found["revision"] else "as the file says"
    processes = counted(len(found["processes"]), "process", "processes")
    typer.echo(f"Upstreams, {changed}; {processes}\n")
    show_table(
        "",
        (
            *("upstream", "state", "in progress", "waiting", "models", "key", "from"),
            *("load", "remark"),
        ),
        [
            (
                one["name"],
                one["state"],
                _count(one["in_progress"]),
                _count(one["waiting"]),
                _shortened(one["table"].get("models", ["*"])),
                str(one.get("key", "")),
                one["source"],
                one.get("load", ""),
                _remark(one),
            )
            for one in found["upstreams"]
        ],
    )
    behind = [one for one in found["processes"] if one["revision"] != found["revision"]]
    for one in behind:
        typer.echo(f"{one['instance_id']} has revision {one['revision']}")
    for line in found["differing"]:
        typer.echo(legible(line))


def _remark(one: dict[str, Any]) -> str:
    health = one.get("health") or {}
    problems = [f"{where}: {why}" for where, why in one["problems"].items()]
    if one["state"] == "out" and health.get("detail"):
        problems.append(str(health["detail"]))
    return "; ".join(problems)


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)


def _shortened(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_SHOWN
    return ", ".join(texts[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


@app.command()
def add(
    name: Name,
    keys: Keys = None,
    provider: Annotated[
        str | None, typer.Option(help="The provider's preset, such as groq.")
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Its base URL.", metavar="URL")] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="The environment variable with its API key, in every process.", metavar="VARIABLE"
        ),
    ] = None,
    key_file: Annotated[
        str | None,
        typer.Option(
            help="Instead of --key: a file with its API key, below KEY_FOLDER of every process.",
            metavar="PATH",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A pattern of models that it serves; without one those of its preset, else *: "
            "every model that no upstream names.",
            metavar="PATTERN",
        ),
    ] = None,
    weight: Annotated[
        int | None, typer.Option(help="Its share among upstreams of the same model.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="A limit, such as rpm:total=60. Default: the preset's.", metavar="ID=N"),
    ] = None,
    no_test: Annotated[
        bool, typer.Option("--no-test", help="Do not request its models first.")
    ] = False,
    dry_run: DryRun = False,
    expect: Expect = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Add an upstream in all processes, permanently, after a test of it.

    Every process must have its key; otherwise nothing changes, and the message names the process.
    """
    table = parsed(keys or [], "upstreams add")
    options = given(
        provider=provider,
        base_url=base_url,
        key=key,
        key_file=key_file,
        models=model,
        weight=weight,
        limits=parsed(limit, "--limit") if limit else None,
    )
    body = {"table": _with_options(table, options), "test": not no_test}
    _change("PUT", name, body, dry_run=dry_run, expect=expect, reason=reason, json=json)


def _with_options(table: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    for twice in table.keys() & options.keys():
        raise ConfigError("upstreams add", None, f"must name {twice} once, by KEY=VALUE or option")
    return table | options


@app.command("set")
def set_(
    name: Name,
    keys: Keys = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="A key to remove.", metavar="KEY")
    ] = None,
    deployed: Annotated[
        bool, typer.Option("--deployed", help="Restore the settings of the file.")
    ] = False,
    read_again: Annotated[
        bool,
        typer.Option(
            "--read-again", help="Read its API key and files again, for example after a rotation."
        ),
    ] = False,
    dry_run: DryRun = False,
    expect: Expect = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Change an upstream in all processes, permanently. Running calls are not affected."""
    values = parsed(keys or [], "upstreams set")
    if bool(values or remove) + deployed + read_again != 1:
        allowed = "needs changes such as weight=3, or --remove, or --deployed, or --read-again"
        raise ConfigError("upstreams set", None, allowed)
    body = {
        "set": values,
        "remove": remove or [],
        "deployed": deployed,
        "read_again": read_again,
    }
    _change("PATCH", name, body, dry_run=dry_run, expect=expect, reason=reason, json=json)


@app.command("test")
def ask(name: Name, json: Json = False) -> None:
    """Request an upstream's models from an API process, with its key and through its proxy."""
    found = _call("POST", f"/{_quoted(name)}/test")
    if json:
        show_json(found)
    else:
        _show_tests(found)
    if any(one["problem"] for one in found):
        raise typer.Exit(FAILED)


def _show_tests(tests: list[dict[str, Any]]) -> None:
    for one in tests:
        status = "no answer" if one["status"] is None else f"status {one['status']}"
        line = f"{one['dialect']} at {one['url']}: {status} in {one['took_ms']:.0f} ms"
        if one["problem"]:
            line += f": {one['problem']}"
        elif one["model_count"]:
            line += f", {one['model_count']} models: {_shortened(one['models'])}"
        elif one["status"] != 200:
            line += ", which has no list of models: its key is not tested"
        typer.echo(legible(line))
        if one["load"]:
            typer.echo(legible(f"  {one['load']}"))
        if one["unlisted"]:
            typer.echo(legible(f"  not in its list: {', '.join(one['unlisted'])}"))


@app.command()
def drain(
    name: Name,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until no call is in progress there.")
    ] = False,
    for_: Annotated[
        str | None,
        typer.Option("--for", help="Maximum time of --wait: 30s, 10m, 2h."),
    ] = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Stop sending new calls to an upstream; running calls finish, and objects that are stored
    there stay reachable."""
    if for_ is not None and not wait:
        why = "needs --wait, whose length it is: an upstream stays drained until it is resumed"
        raise ConfigError("--for", for_, why)
    until = time.monotonic() + (span_ms("--for", for_) / 1000 if for_ else float("inf"))
    path = f"/{_quoted(name)}/drain"
    body: dict[str, Any] = {"by": who(), "reason": reason, "dry_run": False}

    async def work(gateway: GatewayClient) -> dict[str, Any]:
        while True:
            done: dict[str, Any] = await gateway.send("POST", f"/admin/upstreams{path}", body)
            if body["dry_run"] and done["changes"]:  # it would have to be drained again
                raise UpstreamsChanged(f"{name} was resumed meanwhile: it is not drained")
            if not wait or _is_empty(done) or time.monotonic() > until:
                return done
            body["dry_run"] = not done["unreached"]
            await asyncio.sleep(_POLL_S)

    done = with_gateway(work)
    if json:
        show_json(done)
    else:
        calls = "call" if done["in_progress"] == 1 else "calls"
        left = f"{_count(done['in_progress'])} {calls} in progress"
        if done["background"]:
            left += f", {done['background']} in the background"
        if done["batches"]:
            left += f", {counted(done['batches'], 'batch', 'batches')}"
        state = "is drained" if _is_empty(done) else f"takes no new calls; left: {left}"
        typer.echo(f"{name} {state}")
        _show_unreached(done)
    if done["unreached"] or (wait and not _is_empty(done)):
        raise typer.Exit(FAILED)


def _is_empty(done: dict[str, Any]) -> bool:
    return done["in_progress"] == 0 and not (done["background"] or done["batches"])


@app.command()
def resume(name: Name, dry_run: DryRun = False, reason: Reason = "", json: Json = False) -> None:
    """Send calls to a drained upstream again."""
    path = f"{_quoted(name)}/resume"
    _change("POST", path, {}, dry_run=dry_run, expect=None, reason=reason, json=json)


@app.command()
def remove(
    name: Name,
    force: Annotated[
        bool,
        typer.Option("--force", help="Even if calls are in progress or objects are stored there."),
    ] = False,
    dry_run: DryRun = False,
    expect: Expect = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Remove a drained upstream in all processes, permanently."""
    query: dict[str, str] = {"by": who(), "reason": reason, "force": str(force).lower()}
    query |= {"dry_run": str(dry_run).lower()}
    query |= {} if expect is None else {"expected": str(expect)}
    _report(_call("DELETE", f"/{_quoted(name)}", query=query), json=json)


@app.command()
def history(
    limit: Annotated[
        int, typer.Option(min=1, max=1_000, help="Maximum number, newest first.")
    ] = 20,
    json: Json = False,
) -> None:
    """List the changes of upstreams: when, by whom and why."""
    found = _call("GET", "/history", query={"most": str(limit)})
    if json:
        show_json(found)
        return
    show_table(
        "",
        ("revision", "at (UTC)", "set by", "changes", "reason"),
        [
            (
                str(one["revision"]),
                str(one["created_at"])[:19].replace("T", " "),
                one["set_by"],
                "\n".join(one["changes"]) or "none",
                one["reason"],
            )
            for one in found
        ],
    )


@app.command()
def rollback(
    revision: Annotated[
        int, typer.Argument(min=0, help="A revision; 0 is the file without live changes.")
    ],
    dry_run: DryRun = False,
    expect: Expect = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Apply the upstreams of an earlier revision, as a new revision."""
    body = {"revision": revision}
    _change("POST", "rollback", body, dry_run=dry_run, expect=expect, reason=reason, json=json)


def _change(
    method: str,
    path: str,
    body: dict[str, Any],
    *,
    dry_run: bool,
    expect: int | None,
    reason: str,
    json: bool,
) -> None:
    signed = {"by": who(), "reason": reason, "dry_run": dry_run, "expected": expect}
    path = path if "/" in path else _quoted(path)
    _report(_call(method, f"/{path}", body | signed), json=json)


def _report(done: dict[str, Any], *, json: bool) -> None:
    if json:
        show_json(done)
    else:
        _show_tests(done["tests"])
        lines = "".join(f"\n  {line}" for line in done["changes"]) or "\n  no change"
        if done["dry_run"]:
            typer.echo(
                legible(f"nothing is changed yet; revision {done['revision']} is in force{lines}")
            )
        else:
            processes = counted(done["processes"], "process", "processes")
            where = f"in {processes} after {done['in_force_ms']:.0f} ms"
            typer.echo(legible(f"revision {done['revision']} is in force {where}{lines}"))
        _show_unreached(done)
    if done["unreached"]:
        raise typer.Exit(FAILED)


def _show_unreached(done: dict[str, Any]) -> None:
    for name in done["unreached"]:
        typer.echo(f"tidegate: warning: {name} does not have it in force yet", err=True)


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _call(
    method: str,
    path: str = "",
    body: dict[str, Any] | None = None,
    query: dict[str, str] | None = None,
) -> Any:
    """Return the JSON of an answer under `/admin/upstreams`."""

    async def work(gateway: GatewayClient) -> Any:
        return await gateway.send(method, f"/admin/upstreams{path}", body, **(query or {}))

    return with_gateway(work)
