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


@reward_app.command("check")
def check(
    service: Annotated[
        str,
        typer.Argument(
            metavar="URL|rwe_…",
            help="URL of a reward service, asked from this machine; or the id of a registered endpoint, asked by the service "
            "that this command line is set up for (DAR_BASE_URL, DAR_API_KEY).",
        ),
    ],
    secret_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the secret (whsec_…) that signs requests; default $DAR_HOME/reward_secret if there is one."
        ),
    ] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Sign no requests.")] = False,
    header: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Secret header; NAME=@FILE reads the value from a file, which keeps it out of the list of processes. "
            "May be given several times.",
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="What the service speaks; default dar.reward.v1.")
    ] = None,
    component: Annotated[
        Path | None,
        typer.Option(help="JSON file with fields of a job's component, like columns or template."),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file of two to eight samples: prompt or messages, completion, and perhaps ground_truth and columns."
        ),
    ] = None,
    reply: Annotated[
        str | None, typer.Option(help="sync, or either: the service may answer 202 and call back.")
    ] = None,
    light: Annotated[
        bool, typer.Option("--light", help="Only steps 1 to 4, as when a job is submitted.")
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=256, help="Requests at once under load; default 8.")
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option(min=1, max=256, help="Samples in a full request; default 16.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.1, max=3600, help="Seconds for one attempt; default 60."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object, without more.")
    ] = False,
) -> None:
    """Ask a reward service as a job would, in nine steps, and say what is wrong with it and what to do.

    Sends up to 36 requests, 20 of them full ones at full concurrency; with --light at most 6. Exits with 0 if a job could use the
    service, with 1 if not, and with 2 if the command line is wrong.
    """
    run = import_module("dar.cli.reward_check")
    run.run(
        service,
        run.Options(
            secret_file=secret_file,
            is_unsigned=unsigned,
            headers=header or [],
            protocol=protocol,
            component=component,
            samples=samples,
            reply=reply,
            is_light=light,
            concurrency=concurrency,
            max_samples=max_samples,
            timeout=timeout,
            as_json=json,
        ),
    )
