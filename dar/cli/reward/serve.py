"""``dar reward serve``: from ``module:function`` to a running reward service."""

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from dar.errors import ConfigurationError
from dar.processes import require
from dar.rewards.http.signing import secrets_in, secrets_in_file
from dar.settings import load_settings

TARGET = "MODULE:FUNCTION"


def run(
    target: str,
    *,
    host: str,
    port: int,
    secret_files: Sequence[Path],
    is_insecure: bool,
    options: Mapping[str, Any],
) -> None:
    """Serve the function or application ``target``.

    Args:
        target: ``module:function``.
        host: Address to bind to.
        port: Port to bind to.
        secret_files: Files with accepted secrets; none: the installation's secret.
        is_insecure: Do not verify signatures.
        options: Other fields of `dar.rewards.server.ServerOptions`.

    Raises:
        ConfigurationError: Libraries are missing, a secret cannot be used, or the address cannot
            be bound.
        typer.BadParameter: An option or ``target`` cannot be used.
    """
    require("reward server", "starlette")
    require("reward server", "uvicorn")
    # Imported here: without the extra the import fails.
    server = importlib.import_module("dar.rewards.server")
    function = _named(target)
    if hasattr(function, "routes"):
        if secret_files or is_insecure or options:
            raise _bad_target(
                "an application has its own secret and options: pass them to reward_server"
            )
        given: dict[str, Any] = {}
    else:
        given = {**options, "secret": _secrets(secret_files, is_insecure=is_insecure)}
    server.serve(function, host=host, port=port, started=_announce, **given)


def _named(target: str) -> Callable[..., Any]:
    module_name, _, path = target.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        file = Path(module_name)
        raise _bad_target(
            f"{target!r} names a file, but must be module:function; run it in "
            f"{file.parent.resolve()} and give {file.stem}:{path or 'function'}"
        )
    if not (module_name and path):
        raise _bad_target(f"{target!r} is not of the form module:function, like rewards:brevity")
    found: Any = _module(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            raise _bad_target(f"{module_name} has no {path}{_likely(found)}")
        found = getattr(found, name)
    if not callable(found):
        raise _bad_target(f"{target} is of the type {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function


def _likely(module: object) -> str:
    """A hint: the functions that the module defines."""
    own = [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", "") == getattr(module, "__name__", None)
    ]
    return f"; it defines {', '.join(sorted(own)[:8])}" if own else ""


def _module(name: str) -> object:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise _bad_target(f"module {name} is neither in {folder} nor installed") from None
        raise _broken(name, error) from None
    except Exception as error:  # noqa: BLE001 - a user's module may raise anything
        raise _broken(name, error) from None


def _broken(name: str, error: Exception) -> typer.BadParameter:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return _bad_target(f"importing {name} failed: {type(error).__name__}: {error}{place}")


def _bad_target(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=TARGET)


def _secrets(files: Sequence[Path], *, is_insecure: bool) -> list[str]:
    if is_insecure:
        if files:
            raise typer.BadParameter("use this option or --insecure", param_hint="--secret-file")
        return []
    if files:
        return [secret for file in files for secret in _read(file.expanduser())]
    settings = load_settings()
    if settings.reward_secret is not None:
        return secrets_in(settings.reward_secret.get_secret_value())
    file = settings.home / "reward_secret"
    if not file.exists():
        raise typer.BadParameter(
            f"no secret: {file} does not exist. Name a file with the secret of your jobs, or use "
            "--insecure to answer every request",
            param_hint="--secret-file",
        )
    return _read(file)


def _read(file: Path) -> list[str]:
    try:
        return secrets_in_file(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigurationError(f"the secret in {file} cannot be read: {reason}") from None


def _announce(url: str, endpoint: Any) -> None:  # noqa: ANN401 - its module needs an extra, so it is not imported here
    """Print the component to stdout, for scripts, and a message to stderr."""
    component = {"name": "reward" if endpoint is None else endpoint.name, "url": url}
    if endpoint is not None and endpoint.answers_later:
        component["reply"] = "either"
    sys.stderr.write(f"Serving {component['name']} at {url}; in a job's rewards.components:\n")
    sys.stdout.write(json.dumps(component) + "\n")
    sys.stdout.flush()
