"""`tidegate keys`: API keys made, listed and revoked."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.call import DEFAULT_TENANT, Scope
from tidegate.cli.limits import span_ms
from tidegate.cli.pool import Json, show_json, show_table, who, with_tenants
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.store.tenants import Key

app = typer.Typer(help="Make, list, keep and revoke API keys.", no_args_is_help=True)
UNKNOWN_MAKER = "unknown"


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key it is.")] = DEFAULT_TENANT,
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="What it opens; infer and read if not given. admin opens all of /admin."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="When it stops working: in 30d, 12h. Without it never.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a key. It goes to standard output, this once: only its digest is kept."""
    from tidegate.policy.tenants import check_name
    from tidegate.store.tenants import USUAL_SCOPES

    expires_at = None
    if expires is not None:
        try:
            expires_at = datetime.now(UTC) + timedelta(milliseconds=span_ms("--expires", expires))
        except OverflowError:
            raise ConfigError("--expires", expires, "must end before the year 10000") from None
    check_name(tenant)
    key, made = with_tenants(
        lambda tenants: tenants.create_key(
            tenant,
            name=name,
            scopes=scope or USUAL_SCOPES,
            expires_at=expires_at,
            made_by=who(),
        )
    )
    if json:
        show_json({"key": made.text, **_plain(key)})
        return
    typer.echo(made.text)
    what = f"a key of {tenant} for {' and '.join(key.scopes)}, named by its prefix {key.prefix}"
    sys.stderr.write(f"tidegate: {what}; keep it, it is not shown again\n")


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.")] = None,
    prefix: Annotated[str, typer.Option(help="How the prefix begins.")] = "",
    json: Json = False,
) -> None:
    """Show keys by their prefixes, the oldest first, never the keys themselves."""
    from tidegate.policy.tenants import check_name

    start = prefix.removeprefix("tg_").partition("_")[0]
    if not start.isascii():
        raise ConfigError("--prefix", ascii(start), "must be letters and digits")
    if tenant is not None:
        check_name(tenant)
    keys = with_tenants(lambda tenants: tenants.list_keys(tenant, start))
    if json:
        show_json([_plain(key) for key in keys])
    elif not keys:
        typer.echo("no key is there: tidegate keys create makes one")
    else:
        show_table(
            "",
            (
                *("prefix", "tenant", "state", "scopes", "last used (UTC)", "expires (UTC)"),
                *("made by", "name"),
            ),
            [
                (
                    key.prefix,
                    key.tenant_id,
                    key.state,
                    " ".join(key.scopes),
                    _minute(key.last_used_at),
                    _minute(key.expires_at),
                    key.made_by or UNKNOWN_MAKER,
                    key.name,
                )
                for key in keys
            ],
        )


@app.command()
def keep(
    prefix: Annotated[str, typer.Argument(help="The key's prefix, or the key itself.")],
    json: Json = False,
) -> None:
    """Answer for a key of which nobody knows who made it: `doctor` then lists it no more."""
    from tidegate.store.api_keys import prefix_in

    meant = prefix_in(prefix)
    if meant is None:
        raise ConfigError("keys keep", "(prefix)", "must be a key's prefix of 10 characters")
    key = with_tenants(lambda tenants: tenants.keep_key(meant, by=f"kept by {who()}"))
    if json:
        show_json(_plain(key))
    else:
        typer.echo(f"{key.prefix} of {key.tenant_id}: {key.made_by}")


@app.command()
def revoke(
    prefix: Annotated[str, typer.Argument(help="The key's prefix, or the key itself.")],
    json: Json = False,
) -> None:
    """End a key for good; it is refused everywhere within a second."""
    from tidegate.store.api_keys import prefix_in

    meant = prefix_in(prefix)
    if meant is None:
        raise ConfigError("keys revoke", "(prefix)", "must be a key's prefix of 10 characters")
    key = with_tenants(lambda tenants: tenants.revoke_key(meant, by=who()))
    if json:
        show_json(_plain(key))
    else:
        typer.echo(f"{key.prefix} of {key.tenant_id} is revoked")


def _plain(key: Key) -> dict[str, Any]:
    from dataclasses import asdict

    values = asdict(key)
    return {"tenant": values.pop("tenant_id"), **values, "state": key.state}


def _minute(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M}"
