"""``dar reward rotate-secret``: a new secret for requests to services that jobs name by URL."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import typer

from dar.client import Client
from dar.disk import PRIVATE, write_atomically
from dar.rewards.http.signing import secrets_in


def run(secret_file: Path | None, *, is_overlapping: bool) -> None:
    """Rotate the project's secret, and print it or write it into ``secret_file``.

    The file then has the new secret in its first line, and the one that was there in the second.

    Raises:
        typer.BadParameter: The file cannot be written; nothing was rotated.
    """
    before = [] if secret_file is None else _checked(secret_file)
    with Client() as client:
        made = client.reward_secret.rotate(keep_old_secret_active_for_24_hours=is_overlapping)
    if secret_file is None:
        typer.echo(made.signing_secret)
    else:
        lines = [made.signing_secret, *(before[:1] if is_overlapping else [])]
        try:
            with _private_files():
                write_atomically(secret_file, "".join(f"{line}\n" for line in lines).encode())
        except OSError:
            typer.echo(made.signing_secret)  # it cannot be shown again
            raise
    where = "Keep it; it is not shown again" if secret_file is None else f"It is in {secret_file}"
    overlap = (
        "attempts that start within 24 hours sign with the old secret too"
        if is_overlapping
        else "attempts that start from now on sign with it alone"
    )
    sys.stderr.write(f"{where}. Restart your reward services with it: {overlap}.\n")


def _checked(file: Path) -> list[str]:
    """The secrets in a file, which may be missing, after trying to write into its folder."""
    try:
        before = secrets_in(file.read_text(encoding="utf-8")) if file.exists() else []
        with NamedTemporaryFile(dir=file.parent):
            pass
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise typer.BadParameter(f"{file} cannot be rewritten: {why}") from None
    return before


@contextmanager
def _private_files() -> Iterator[None]:
    """New files are readable by their owner alone."""
    former = os.umask(PRIVATE)
    try:
        yield
    finally:
        os.umask(former)
