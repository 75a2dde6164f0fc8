"""`tidegate submit`, `status` and `requests`: for those who use a Tidegate that runs somewhere."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from tidegate.call import Kind
from tidegate.cli.client import Gateway, calling
from tidegate.cli.following import Progress, follow, save_pictures, show_answer, wait
from tidegate.cli.limits import span_ms
from tidegate.cli.pool import Json, show_json
from tidegate.errors import ConfigError

Output = Annotated[
    Path | None,
    typer.Option(help="Save pictures here: a folder, or the name of one picture."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Print the answer when it is there.")]
FollowIt = Annotated[
    bool, typer.Option("--follow", help="The same, and show each state meanwhile.")
]


def submit(
    text: Annotated[
        str, typer.Argument(help="The prompt; - reads it from standard input.", show_default=False)
    ] = "",
    file: Annotated[
        list[Path] | None,
        typer.Option(help="A file that goes with it; as often as needed.", exists=True),
    ] = None,
    image_uri: Annotated[
        str | None, typer.Option(help="A public picture that Tidegate fetches.")
    ] = None,
    type_: Annotated[
        Kind | None, typer.Option("--type", help="What is asked for, instead of having it found.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Instead of the type's own model.")] = None,
    priority: Annotated[
        int | None, typer.Option(min=-100, max=100, help="Higher goes first; 0 is usual.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(help="Let it expire if its turn has not come in 30s, 10m, 2h.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Handing in again under the same key changes nothing.")
    ] = None,
    webhook_url: Annotated[str | None, typer.Option(help="Is told of the end.")] = None,
    subject: Annotated[str | None, typer.Option(help="Whom it is about, to erase it by.")] = None,
    wait_: Wait = False,
    follow_: FollowIt = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Hand in a request. Prints its id, or with --wait or --follow its answer."""
    if text == "-":
        text = sys.stdin.read()
    given = {
        "data": text or None,
        "image_uri": image_uri,
        "type": None if type_ is None else type_.value,
        "model": model,
        "priority": priority,
        "deadline_ms": None if deadline is None else span_ms("--deadline", deadline),
        "webhook_url": webhook_url,
        "subject": subject,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    if not text and not file and not image_uri:
        raise ConfigError("TEXT", "(not given)", "give a prompt, a --file or an --image-uri")

    async def work() -> int:
        from tidegate.config import load_client

        async with Gateway(load_client()) as gateway:
            accepted = await gateway.submit(fields, tuple(file or ()), idempotency_key)
            if not (wait_ or follow_ or output):
                _say_accepted(accepted, json)
                return 0
            return await _to_the_end(gateway, accepted["request_id"], follow_, output, json)

    raise typer.Exit(calling(work()))


def status(
    request_id: Annotated[str, typer.Argument(help="The id that `submit` printed.")],
    follow_: Annotated[
        bool, typer.Option("--follow", help="Show each state until it has ended.")
    ] = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Show where a request stands, and its answer. The exit code is 1 if it has failed."""
    from uuid import UUID

    with suppress(ValueError):
        request_id = str(UUID(request_id))

    async def work() -> int:
        from tidegate.config import load_client

        async with Gateway(load_client()) as gateway:
            if follow_:
                return await _to_the_end(gateway, request_id, True, output, json)
            view = await gateway.get(f"/status/{request_id}")
            if json:
                show_json(view)
            progress = Progress(silent=json)
            progress.state(view)
            await save_pictures(gateway, view, output, progress)
            if view["status"] in ("queued", "running"):
                return await _say_waiting(gateway, view, progress)
            return _code_of(view) if json else show_answer(view)

    raise typer.Exit(calling(work()))


async def _say_waiting(gateway: Gateway, view: dict[str, Any], progress: Progress) -> int:
    if view["status"] == "queued":
        why = await gateway.get(f"/requests/{view['request_id']}/why")
        progress.note(f"it {why['sentence']}")
    return 0


async def _to_the_end(
    gateway: Gateway, request_id: str, follows: bool, output: Path | None, json: bool
) -> int:
    """Stay until it has ended, print what came; the exit code."""
    progress = Progress(silent=json or not follows)
    try:
        if follows:
            with progress.shown():
                view = await follow(gateway, request_id, progress, as_json=json)
        else:
            view = await wait(gateway, request_id)
    except asyncio.CancelledError:  # Ctrl-C
        sys.stderr.write(
            f"tidegate: request {request_id} goes on without you; "
            f"tidegate status {request_id} --follow finds it again\n"
        )
        raise
    if json and not follows:
        show_json(view)
    saving = Progress(silent=json)
    await save_pictures(gateway, view, output, saving)
    return _code_of(view) if json else show_answer(view)


def _code_of(view: dict[str, Any]) -> int:
    return 0 if view["status"] in ("succeeded", "queued", "running") else 1


def _say_accepted(accepted: dict[str, Any], json: bool) -> None:
    if json:
        show_json(accepted)
        return
    typer.echo(accepted["request_id"])
    kind = accepted.get("type") or "of a type that is not certain yet"
    sys.stderr.write(
        f"tidegate: {accepted['status']}, {kind}; "
        f"tidegate status {accepted['request_id']} --follow shows the rest\n"
    )
