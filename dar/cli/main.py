"""The ``dar`` command. Results go to stdout, messages to stderr.

This module only declares commands and their options. The code of a command is imported when it
runs, so that ``dar --help`` is fast and never loads a web server, a database or torch.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from dar.cli.keys import keys_app
from dar.cli.reward.main import reward_app
from dar.demo.tasks import TASKS, TaskName
from dar.errors import AuthenticationError, DARError, NotFoundError, ServiceConnectionError
from dar.output import written_output
from dar.version import __version__

EXIT_ERROR, EXIT_AUTH, EXIT_NOT_FOUND, EXIT_UNREACHABLE = 1, 4, 5, 7

app = typer.Typer(
    name="dar",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Align a language model against a reward you own (Direct Advantage Regression).",
)

app.add_typer(reward_app)
app.add_typer(keys_app)

storage_app = typer.Typer(
    name="storage",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Where uploaded files and checkpoints are kept.",
)
app.add_typer(storage_app)


def _folder(text: str) -> Path:
    if not text.strip():
        raise typer.BadParameter("it is empty, which would mean the current folder; give a folder")
    return Path(text)


Home = Annotated[
    Path | None,
    typer.Option(
        parser=_folder,
        metavar="<path>",
        help="Folder of all stored data; default $DAR_HOME or ~/.local/share/dar.",
    ),
]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"dar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def up(
    home: Home = None,
    host: Annotated[str | None, typer.Option(help="Address to bind to.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to bind to.")] = None,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Workers, one slot each.")] = 1,
) -> None:
    """Run everything on this machine: service, Valkey and workers.

    A process that dies is restarted. One Ctrl-C stops all of them cleanly. Running jobs write a
    checkpoint first and continue from it at the next start.
    """
    import_module("dar.cli.up").run(home=home, host=host, port=port, workers=workers)


@app.command()
def demo(
    home: Home = None,
    task: Annotated[
        TaskName, typer.Option(help="Task to train: reviews, or brackets, whose optimum is known.")
    ] = "reviews",
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")
    ] = False,
) -> None:
    """Train a small model against a reward service, through the real system, in about two minutes.

    Makes a base model on the first run, starts everything, submits a job over the public API,
    follows it, downloads the weights and samples them. Exits with 0 only if the mean reward of
    fresh samples rose by more than 0.4. With ``--task brackets``, exits with 0 only if the model
    ends near the optimum.
    """
    import_module("dar.demo.run").run(home=home, as_json=json, task=TASKS[task])


@app.command()
def serve(
    home: Home = None,
    host: Annotated[str | None, typer.Option(help="Address to bind to.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to bind to.")] = None,
) -> None:
    """Run the service alone. Settings come from the environment (DAR_…)."""
    import_module("dar.processes").become(
        "service", "fastapi", "service", "serve", home=home, host=host, port=port
    )


@app.command()
def worker(
    home: Home = None,
    slot: Annotated[str | None, typer.Option(help="Name of the slot; one worker per slot.")] = None,
    devices: Annotated[str | None, typer.Option(help="GPUs, like 0 or 0,1; default all.")] = None,
) -> None:
    """Run one worker, which trains one job at a time.

    Settings come from the environment (DAR_…).
    """
    import_module("dar.processes").become(
        "worker", "torch", "worker", home=home, slot=slot, devices=devices
    )


@app.command()
def migrate(home: Home = None) -> None:
    """Upgrade the database to the schema of this version, then exit."""
    import_module("dar.processes").become("service", "alembic", "service", "migrate", home=home)


@app.command()
def backup(
    folder: Annotated[
        Path, typer.Argument(parser=_folder, metavar="FOLDER", help="New folder for the backup.")
    ],
    home: Home = None,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy every file, instead of hard links on the same disk."),
    ] = False,
    with_secret_keys: Annotated[
        bool,
        typer.Option("--with-secret-keys", help="Include the keys that decrypt stored secrets."),
    ] = False,
) -> None:
    """Back up the database, uploads, checkpoints and keys, also while everything runs.

    Every file is verified. Base models are not included. A PostgreSQL database is copied with
    pg_dump.
    """
    options = {"--copy": copy, "--with-secret-keys": with_secret_keys}
    chosen = [name for name, is_given in options.items() if is_given]
    arguments = ("service", "backup", str(folder.absolute()), *chosen)
    import_module("dar.processes").become("service", "alembic", *arguments, home=home)


@app.command()
def restore(
    folder: Annotated[
        Path, typer.Argument(parser=_folder, metavar="FOLDER", help="Folder of a backup.")
    ],
    home: Home = None,
) -> None:
    """Restore a backup into an empty home, and for PostgreSQL into an empty database.

    Nothing is written unless every file of the backup is whole. Running jobs continue from their
    newest checkpoint in the backup.
    """
    arguments = ("service", "restore", str(folder.absolute()))
    import_module("dar.processes").become("service", "alembic", *arguments, home=home)


@storage_app.command("move")
def move_storage(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Folder, or s3://bucket/prefix.")],
    home: Home = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Trust the files that the target has, and read none again."),
    ] = False,
) -> None:
    """Copy all uploaded files and checkpoints into another storage, and verify them there.

    It needs the settings of the service, and for a bucket DAR_S3_…. The service may run. Stop it
    then, run the command again with --quick, and start it with DAR_STORAGE_URL=TARGET. A command
    that was interrupted is repeated, and goes on where it was. The old place keeps its files.
    """
    place = target if "://" in target else str(_folder(target).absolute())
    arguments = ("service", "move-storage", place, *["--quick"] * quick)
    import_module("dar.processes").become("service", "alembic", *arguments, home=home)


@app.command()
def retention() -> None:
    """Show what the service would delete now, by age and by size. Deletes nothing."""
    with import_module("dar.client").Client() as client:
        preview = client.retention_preview()
    for item in preview.items:
        limit = f"{item.limit:,.0f}" if item.limit else "kept"
        size = "" if item.bytes is None else f", {item.bytes:,} bytes"
        typer.echo(f"{item.what:18} {item.setting:27} {limit:>15}  {item.rows:,} rows{size}")
    typer.echo(
        f"samples have {preview.samples_bytes:,} bytes; {preview.deleted_jobs} deleted jobs left"
    )


@app.command("rotate-secrets")
def rotate_secrets(home: Home = None) -> None:
    """Encrypt the secrets of all reward endpoints with the first of DAR_SECRET_KEYS, then exit.

    Afterwards the other keys are no longer needed.
    """
    import_module("dar.processes").become(
        "service", "alembic", "service", "rotate-secrets", home=home
    )


@app.command()
def doctor(
    audit: Annotated[
        bool,
        typer.Option("--audit", help="Check every job, attempt, event and checkpoint."),
    ] = False,
    home: Home = None,
    acknowledged: Annotated[
        Path | None,
        typer.Option(
            help='With --audit: what clients saw accepted, lines of {"job_id": …, "key": …}.'
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="With --audit: do not read the files of checkpoints.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check on the service's host that nothing was lost, doubled or damaged.

    Reads the database and the artifacts, and changes nothing; the service may run meanwhile. Exits
    with 1 if a rule is broken. Example: dar doctor --audit --quick
    """
    if not audit:
        raise typer.BadParameter(
            "name what to check; --audit checks all jobs", param_hint="--audit"
        )
    options = ["--acknowledged", str(acknowledged)] if acknowledged else []
    options += ["--quick"] * quick + ["--json"] * json
    import_module("dar.processes").become(
        "service", "alembic", "service", "audit", *options, home=home
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    options_metavar="--model_name_or_path MODEL --dataset_name DATA --output_dir FOLDER [OPTIONS]",
)
def train(context: typer.Context) -> None:
    """Train a model in this terminal, without any service.

    The same as python -m dar.training, which accelerate launch can start in several processes. dar
    train --help lists all options. They may also come from a YAML file (--config). --dry-run scores
    two prompts and writes nothing.
    """
    import_module("dar.processes").become("worker", "torch", "dar.training", *context.args)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    options_metavar="--model_name_or_path MODEL --dataset_name DATA --reward_url URL [OPTIONS]",
)
def forecast(context: typer.Context) -> None:
    """Forecast the reward that each distance from the base model buys, before any training.

    Samples the base model on a few prompts, scores the completions, and shows the mean reward at
    which training ends for each KL budget. Takes the options of dar train, and writes nothing.
    """
    arguments = ("--forecast", *context.args)
    import_module("dar.processes").become("worker", "torch", "dar.training", *arguments)


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="Folder of a downloaded adapter.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the merged model; it is created.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the base model; default: the adapter's."),
    ] = None,
) -> None:
    """Merge a downloaded LoRA adapter into its base model, without any service.

    The merged model loads with transformers' AutoModelForCausalLM, without peft.
    """
    import_module("dar.processes").require("merge command", "torch")
    import_module("dar.training.merge").merge(folder, output, base)
    typer.echo(output)


def _exit_code(error: DARError) -> int:
    codes: tuple[tuple[type[DARError], int], ...] = (
        (AuthenticationError, EXIT_AUTH),
        (NotFoundError, EXIT_NOT_FOUND),
        (ServiceConnectionError, EXIT_UNREACHABLE),
    )
    return next((code for cls, code in codes if isinstance(error, cls)), EXIT_ERROR)


def main() -> None:
    """Run the command line. A known error is one line on stderr and an exit code, no traceback."""
    try:
        with written_output("dar"):
            app()
    except DARError as error:
        sys.stderr.write(f"dar: {error.message}\n")
        for problem in error.problems:
            where = f"row {problem.row}" if problem.row is not None else problem.param
            sys.stderr.write(f"  {': '.join(filter(None, [where, problem.message]))}\n")
        sys.exit(_exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)
