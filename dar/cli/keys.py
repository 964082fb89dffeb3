"""``dar keys``: API keys of users and workers, made, listed and revoked over the service's API."""

import re
import sys
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dar.protocol.api_keys import ApiKey

SECONDS = {"m": 60, "h": 3600, "d": 86_400}
LASTING = re.compile(r"([1-9][0-9]{0,6})([mhd])", re.ASCII)

keys_app = typer.Typer(
    name="keys",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make, list and revoke API keys of users and workers. Needs a key of scope admin.",
)


def _lasting(text: str) -> int:
    found = LASTING.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no duration; write it like 90d, 12h or 30m")
    return int(found[1]) * SECONDS[found[2]]


Scopes = Annotated[
    list[str],
    typer.Option(
        "--scope",
        metavar="read|submit|admin|worker",
        help="What the key may do; repeatable. A worker's key has the scope worker alone.",
    ),
]
Node = Annotated[
    str | None,
    typer.Option(help="With --scope worker: the only node (DAR_NODE) whose workers may use it."),
]
Expires = Annotated[
    int | None,
    typer.Option(parser=_lasting, metavar="90d", help="When it expires: 90d, 12h, 30m."),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@keys_app.command("create")
def create(
    scope: Scopes,
    name: Annotated[str | None, typer.Option(help="A name for people.")] = None,
    node: Node = None,
    expires: Expires = None,
    json: AsJSON = False,
) -> None:
    """Make a key and print it, only this once: the service stores its digest.

    Example: dar keys create --scope worker --node gpu-7 --expires 90d
    """
    with import_module("dar.client").Client() as client:
        made = client.api_keys.create(scope, name=name, node=node, expires_in_seconds=expires)
    if json:
        typer.echo(made.model_dump_json())
        return
    sys.stderr.write(f"{_line(made)}\nKeep the key; it is not shown again:\n")
    typer.echo(made.key)


@keys_app.command("list")
def list_keys(json: AsJSON = False) -> None:
    """List the project's keys and those of workers, with their state and last use, newest first.

    The keys themselves are never shown.
    """
    with import_module("dar.client").Client() as client:
        for key in client.api_keys.list():
            typer.echo(key.model_dump_json() if json else _line(key))


@keys_app.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(metavar="key-…", help="Id of the key.")]) -> None:
    """Make a key invalid at once.

    A worker with this key claims no further job. Its running attempt goes on with a token of its
    own; POST /v1/workers/ban ends that too.
    """
    with import_module("dar.client").Client() as client:
        typer.echo(_line(client.api_keys.revoke(key_id)))


def _line(key: "ApiKey") -> str:
    where = f"node {key.node}" if key.node else "settings" if key.is_configured else ""
    expiry = "never expires" if key.expires_at is None else f"expires {_day(key.expires_at)}"
    used = "never used" if key.last_used_at is None else f"used {_day(key.last_used_at)}"
    return (
        f"{key.id:30}  {key.state:8} {' '.join(key.scopes):18} {where:16} {expiry:24} {used:22} "
        f"{key.name or ''}"
    ).rstrip()


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "minutes").removesuffix("+00:00")
