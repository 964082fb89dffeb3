"""``dar reward``: commands for those who write reward services."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

reward_app = typer.Typer(
    name="reward",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="For those who write reward services.",
)


Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="A reward function, or an application made by dar.rewards.server.reward_server; modules of the current folder "
        "are found too.",
    ),
]
Host = Annotated[str, typer.Option(help="Address to bind to; 0.0.0.0 for other machines.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to bind to; 0 takes a free one.")]
UrlPath = Annotated[str | None, typer.Option(help="Where rewards are asked for; default /score.")]
SecretFiles = Annotated[
    list[Path] | None,
    typer.Option(
        help="File with a secret (whsec_…); may be given several times. Default $DAR_HOME/reward_secret if there is one."
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Check no signatures and answer everybody.")
]
MaxCalls = Annotated[
    int | None,
    typer.Option(
        min=1, help="Calls at once; default 1 for a plain function, 64 for a coroutine one."
    ),
]
MaxBody = Annotated[int | None, typer.Option(min=1, help="Largest request; default 8 MiB.")]
Later = Annotated[
    bool, typer.Option("--asynchronous", help="Answer 202, and give the result later.")
]
Within = Annotated[
    float | None, typer.Option(min=0, help="Seconds in which a 200 is still given, before a 202.")
]
StopSeconds = Annotated[
    float | None, typer.Option(min=0, help="Longest time to finish at a stop; default 30.")
]


@reward_app.command("serve")
def serve(
    target: Target,
    host: Host = "127.0.0.1",
    port: Port = 9000,
    path: UrlPath = None,
    secret_file: SecretFiles = None,
    insecure: Insecure = False,
    max_calls: MaxCalls = None,
    max_body_bytes: MaxBody = None,
    asynchronous: Later = False,
    answer_within: Within = None,
    stop_seconds: StopSeconds = None,
) -> None:
    """Serve a Python function as a reward service.

    It has the signature of TRL's reward functions. Prints the URL and the component that a job names, then serves until
    Ctrl-C or SIGTERM.
    """
    options = {
        "path": path,
        "max_calls": max_calls,
        "max_body_bytes": max_body_bytes,
        "asynchronous": asynchronous or None,
        "answer_within_seconds": answer_within,
        "stop_seconds": stop_seconds,
    }
    import_module("dar.cli.reward_serve").run(
        target,
        host=host,
        port=port,
        secret_files=secret_file or [],
        is_insecure=insecure,
        options={name: value for name, value in options.items() if value is not None},
    )
