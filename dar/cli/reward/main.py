"""``dar reward``: commands for authors of reward services."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

reward_app = typer.Typer(
    name="reward",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Check and serve reward services.",
)

Service = Annotated[
    str,
    typer.Argument(
        metavar="URL|rwe_…",
        help="URL of a reward service, called from this machine; or id of a registered endpoint, "
        "called by the DAR service (DAR_BASE_URL, DAR_API_KEY).",
    ),
]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the secret (whsec_…) that signs requests, or with several, one a line; "
        "default $DAR_REWARD_SECRET, else $DAR_HOME/reward_secret if it exists."
    ),
]
Unsigned = Annotated[bool, typer.Option("--unsigned", help="Do not sign requests.")]
Headers = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        metavar="NAME=VALUE",
        help="Secret header; NAME=@FILE reads the value from a file, so that it is not visible in "
        "the process list. Repeatable.",
    ),
]
Protocol = Annotated[str | None, typer.Option(help="Protocol; default dar.reward.v1.")]
ComponentFile = Annotated[
    Path | None,
    typer.Option(help="JSON file with fields of a component, such as columns or template."),
]
SamplesFile = Annotated[
    Path | None,
    typer.Option(
        help="JSONL file with 2 to 8 samples: prompt or messages, completion, and optionally "
        "ground_truth and columns."
    ),
]
Reply = Annotated[
    str | None,
    typer.Option(help="sync; or either: the service may answer 202 and send the result later."),
]
Light = Annotated[bool, typer.Option("--light", help="Steps 1 to 4 only, as at job submission.")]
Concurrency = Annotated[
    int | None, typer.Option(min=1, max=256, help="Concurrent requests under load; default 8.")
]
MaxSamples = Annotated[
    int | None, typer.Option(min=1, max=256, help="Samples per full request; default 16.")
]
Timeout = Annotated[
    float | None, typer.Option(min=0.1, max=3600, help="Seconds per attempt; default 60.")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print only the report, as one JSON object.")]


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
    """Check a reward service in nine steps, with the requests that a job would send.

    Reports errors, warnings and what to do about them. Sends up to 36 requests, 20 of them full and
    at full concurrency; with --light at most 6. Exit codes: 0 a job could use the service, 1 it
    could not, 2 the command line is wrong.
    """
    body = import_module("dar.cli.reward.check")
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


Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="A reward function, or an application of dar.rewards.server.reward_server. Modules in "
        "the current folder are found.",
    ),
]
Host = Annotated[str, typer.Option(help="Address to bind to; 0.0.0.0 for other machines.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to bind to; 0 takes a free one.")]
ScorePath = Annotated[str | None, typer.Option("--path", help="Path of requests; default /score.")]
SecretFiles = Annotated[
    list[Path] | None,
    typer.Option(
        help="File with an accepted secret (whsec_…), or with several, one a line; repeatable. "
        "Default $DAR_REWARD_SECRET, else $DAR_HOME/reward_secret."
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Answer every request, signed or not.")]
MaxCalls = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most calls at once; default 1 for a plain function, 64 for a coroutine function.",
    ),
]
MaxBodyBytes = Annotated[int | None, typer.Option(min=1, help="Largest request; default 8 MiB.")]
Asynchronous = Annotated[
    bool, typer.Option("--asynchronous", help="Answer 202 and send the result later.")
]
AnswerWithin = Annotated[
    float | None, typer.Option(min=0, help="Seconds to wait for a 200 before a 202 is sent.")
]
StopSeconds = Annotated[
    float | None, typer.Option(min=0, help="Most seconds to finish work when stopped; default 30.")
]


@reward_app.command("serve")
def serve(
    target: Target,
    host: Host = "127.0.0.1",
    port: Port = 9000,
    path: ScorePath = None,
    secret_file: SecretFiles = None,
    insecure: Insecure = False,
    max_calls: MaxCalls = None,
    max_body_bytes: MaxBodyBytes = None,
    asynchronous: Asynchronous = False,
    answer_within: AnswerWithin = None,
    stop_seconds: StopSeconds = None,
) -> None:
    """Serve a Python function as a reward service.

    The function has the signature of TRL's reward functions. Prints the component for a job's
    rewards.components, then serves until Ctrl-C or SIGTERM.
    """
    options = {
        "path": path,
        "max_calls": max_calls,
        "max_body_bytes": max_body_bytes,
        "asynchronous": asynchronous or None,
        "answer_within_seconds": answer_within,
        "stop_seconds": stop_seconds,
    }
    import_module("dar.cli.reward.serve").run(
        target,
        host=host,
        port=port,
        secret_files=secret_file or [],
        is_insecure=insecure,
        options={name: value for name, value in options.items() if value is not None},
    )


@reward_app.command("rotate-secret")
def rotate_secret(
    secret_file: Annotated[
        Path | None,
        typer.Option(
            help="File of a reward service that gets the new secret as its first line, and keeps the "
            "old one as its second; default: the secret is printed."
        ),
    ] = None,
    drop_old: Annotated[
        bool,
        typer.Option(
            "--drop-old", help="Stop signing with the old secret at once, not after 24 hours."
        ),
    ] = False,
) -> None:
    """Make a new secret for the project's requests to reward services that jobs name by URL.

    The secret of a registered endpoint is rotated with the SDK or over HTTP. Needs a key of scope
    admin.
    """
    import_module("dar.cli.reward.secret").run(secret_file, is_overlapping=not drop_old)
