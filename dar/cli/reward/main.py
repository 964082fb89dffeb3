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
        help="A reward function, or an application made by dar.rewards.server.reward_server; modules of the current folder "
        "are found too.",
    ),
]
Host = Annotated[str, typer.Option(help="Address to bind to; 0.0.0.0 for other machines.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to bind to; 0 takes a free one.")]
ScorePath = Annotated[
    str | None, typer.Option("--path", help="Where rewards are asked for; default /score.")
]
SecretFiles = Annotated[
    list[Path] | None,
    typer.Option(
        help="File with a secret (whsec_…); one per accepted secret. Default $DAR_HOME/reward_secret if there is one."
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
MaxBodyBytes = Annotated[int | None, typer.Option(min=1, help="Largest request; default 8 MiB.")]
Asynchronous = Annotated[
    bool, typer.Option("--asynchronous", help="Answer 202, and give the result later.")
]
AnswerWithin = Annotated[
    float | None,
    typer.Option(min=0, help="Seconds in which a 200 is still given, before a 202."),
]
StopSeconds = Annotated[
    float | None, typer.Option(min=0, help="Longest time to finish at a stop; default 30.")
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
    import_module("dar.cli.reward.serve").run(
        target,
        host=host,
        port=port,
        secret_files=secret_file or [],
        is_insecure=insecure,
        options={name: value for name, value in options.items() if value is not None},
    )
