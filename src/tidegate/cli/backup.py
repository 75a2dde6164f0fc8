"""`tidegate backup` and `tidegate restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.pool import Json, show_json

File = Annotated[Path, typer.Argument(help="A dump in PostgreSQL's custom format.")]


def backup(file: File, json: Json = False) -> None:
    """Write the record (requests, answers, tenants, keys, limits) into a new file.

    Files that were uploaded or generated are not in it: copy DATA_DIR/blobs, or the bucket, after.
    """
    from tidegate.config import load
    from tidegate.supervisor.backup import back_up

    size_bytes = back_up(load(), file)
    if json:
        show_json({"file": str(file), "size_bytes": size_bytes})
        return
    typer.echo(f"wrote {size_bytes / 1_000_000:.1f} MB to {file}")


def restore(file: File, json: Json = False) -> None:
    """Fill an empty database from a file that `tidegate backup` or pg_dump has written."""
    from tidegate.config import load
    from tidegate.supervisor.backup import restore as run

    run(load(), file)
    if json:
        show_json({"file": str(file), "restored": True})
        return
    typer.echo("restored; `tidegate migrate` brings it up to date, as every start does")
