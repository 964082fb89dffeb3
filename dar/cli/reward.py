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

Service = Annotated[
    str,
    typer.Argument(
        metavar="URL|rwe_…",
        help="URL of a reward service, asked from this machine; or the id of a registered endpoint, asked by the service "
        "that this command line is set up for (DAR_BASE_URL, DAR_API_KEY).",
    ),
]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the secret (whsec_…) that signs requests; default $DAR_HOME/reward_secret if there is one."
    ),
]
Unsigned = Annotated[bool, typer.Option("--unsigned", help="Sign no requests.")]
Headers = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        metavar="NAME=VALUE",
        help="Secret header; NAME=@FILE reads the value from a file, which keeps it out of the list of processes. "
        "May be given several times.",
    ),
]
Protocol = Annotated[
    str | None, typer.Option(help="What the service speaks; default dar.reward.v1.")
]
ComponentFile = Annotated[
    Path | None,
    typer.Option(help="JSON file with fields of a job's component, like columns or template."),
]
SamplesFile = Annotated[
    Path | None,
    typer.Option(
        help="JSONL file of two to eight samples: prompt or messages, completion, and perhaps ground_truth and columns."
    ),
]
Reply = Annotated[
    str | None, typer.Option(help="sync, or either: the service may answer 202 and call back.")
]
Light = Annotated[
    bool, typer.Option("--light", help="Only steps 1 to 4, as when a job is submitted.")
]
Concurrency = Annotated[
    int | None, typer.Option(min=1, max=256, help="Requests at once under load; default 8.")
]
MaxSamples = Annotated[
    int | None, typer.Option(min=1, max=256, help="Samples in a full request; default 16.")
]
Timeout = Annotated[
    float | None, typer.Option(min=0.1, max=3600, help="Seconds for one attempt; default 60.")
]
AsJSON = Annotated[
    bool, typer.Option("--json", help="Print the report as one JSON object, without more.")
]


@reward_app.command("check")
def check(
    service: Service,
    secret_file: SecretFile = None,
    unsigned: Unsigned = False,
    header: Headers = None,
    protocol: Protocol = None,
    component: ComponentFile = None,
    samples: SamplesFile = None,
    reply: Reply = None,
    light: Light = False,
    concurrency: Concurrency = None,
    max_samples: MaxSamples = None,
    timeout: Timeout = None,
    json: AsJSON = False,
) -> None:
    """Ask a reward service as a job would, in nine steps, and say what is wrong with it and what to do.

    Sends up to 36 requests, 20 of them full ones at full concurrency; with --light at most 6. Exits with 0 if a job could use the
    service, with 1 if not, and with 2 if the command line is wrong.
    """
    body = import_module("dar.cli.reward_check")
    options = body.Options(
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
    )
    body.run(service, options)
