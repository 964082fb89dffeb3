"""``python -m dar.training``, which is also ``dar train``: a training run from a command line."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
import transformers
from datasets.utils import logging as datasets_logging
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from dar.errors import (
    CheckpointError,
    ConfigurationError,
    DARError,
    InvalidRequestError,
    RewardContractError,
    RewardError,
    ServiceUnavailableError,
    TrainingError,
)
from dar.settings import load_settings
from dar.training.config.config import DARConfig
from dar.training.report.console import TrainingConsole
from dar.training.report.sink import Request
from dar.training.script.assembly import build, config_of
from dar.training.script.dry_run import PREVIEWED_PROMPTS, show_preview
from dar.training.script.flags import CommandLine, ScriptArguments, read_command_line
from dar.training.trainer import DARTrainer


class ExitCode(IntEnum):
    """How a run ends; the numbers are those of ``sysexits.h`` where one fits."""

    DONE = 0
    FAILED = 1
    USAGE = 64
    """What was given cannot work: other arguments, data or models are needed."""
    UNAVAILABLE = 69
    """The hub or a reward service cannot be reached: the same command may work later."""
    INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a known error is a paragraph on stderr and an exit code, never a traceback.

    Args:
        arguments: Default: those of this process.
    """
    try:
        return run(read_command_line(sys.argv[1:] if arguments is None else arguments))
    except DARError as error:
        return _fail(error.message, _exit_code(error), error)
    except torch.OutOfMemoryError as error:
        text = f"the model does not fit into the GPU's memory: {error}; train an adapter (--use_peft) or lower --max_new_tokens"
        return _fail(text, ExitCode.FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted before the first step; nothing was trained", ExitCode.INTERRUPTED)


def run(line: CommandLine) -> int:
    """Train, or try, as ``line`` says.

    Raises:
        DARError: What was asked for cannot work, or training failed.
    """
    resume = line.config.get("resume_from_checkpoint")
    values = {k: v for k, v in line.config.items() if k != "resume_from_checkpoint"}
    with contextlib.ExitStack() as stack:
        if line.is_dry_run:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            # Making the trainer makes its folder, its repository and its trackers.
            values |= {"output_dir": folder, "push_to_hub": False, "report_to": "none"}
        config = config_of(values)
        _quiet(config)
        console = TrainingConsole(line.script.sample_every)
        stop = StopSignals()
        is_main = config.process_index == 0
        with _status(console, "loading …", is_main):
            trainer = build(line.script, config, load_settings(), console, stop)
        if line.is_dry_run:
            with _status(console, "sampling and scoring …", is_main):
                step = trainer.preview(PREVIEWED_PROMPTS)
            if is_main:
                show_preview(trainer, step, console.console, line.config)
            return ExitCode.DONE
        checkpoint = None if resume is None else _checkpoint(str(resume), trainer)
        return _train(trainer, console, stop, checkpoint, line.script)


def _status(
    console: TrainingConsole, text: str, is_main: bool
) -> contextlib.AbstractContextManager[object]:
    return console.console.status(text) if is_main else contextlib.nullcontext()


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a stop with a checkpoint, and a second one into an immediate one."""

    def __init__(self) -> None:
        self.received: int | None = None

    def requested(self) -> Request | None:
        """Drain, once a signal has come."""
        return None if self.received is None else "drain"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals while the context lasts."""
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number


# --- training ----------------------------------------------------------------------------------------------------------


def _train(
    trainer: DARTrainer,
    console: TrainingConsole,
    stop: StopSignals,
    resume: Path | None,
    script: ScriptArguments,
) -> int:
    is_main = trainer.ranks.is_main
    if is_main:
        console.begin(trainer.args.max_steps, 0 if resume is None else _step_of(resume))
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=resume)
    finally:
        console.end()
    step, total = trainer.state.global_step, trainer.args.max_steps
    if trainer.stopped_by is not None:
        if is_main:
            _say_interrupted(console, step, total)
        return 128 + (stop.received or signal.SIGINT)
    trainer.save_model(_internal_call=True)  # which leaves the push, with what only we know, to us
    if trainer.args.push_to_hub:
        trainer.push_to_hub("End of training", dataset=script.dataset_name)
    if is_main:
        console.summary(f"Trained {total} steps.", _where(trainer, console))
        _say_how_to_load(console, trainer)
    return ExitCode.DONE


def _say_interrupted(console: TrainingConsole, step: int, total: int) -> None:
    folder = console.newest_checkpoint
    if folder is None:
        headline, facts = f"Stopped at step {step} of {total}; there was nothing new to save.", {}
    else:
        headline = f"Stopped after step {step} of {total}; a checkpoint was written."
        facts = {
            "checkpoint": str(folder),
            "go on": f"the same command with --resume_from_checkpoint {folder}",
        }
    console.summary(headline, facts)


def _where(trainer: DARTrainer, console: TrainingConsole) -> dict[str, str]:
    facts = {"model": str(trainer.args.output_dir)}
    if console.newest_checkpoint is not None:
        facts["checkpoint"] = str(console.newest_checkpoint)
    if trainer.args.push_to_hub:
        facts["hub"] = str(trainer.hub_model_id)
    return facts


def _say_how_to_load(console: TrainingConsole, trainer: DARTrainer) -> None:
    is_adapter = hasattr(trainer.model, "peft_config")
    package, name = (
        ("peft", "AutoPeftModelForCausalLM")
        if is_adapter
        else ("transformers", "AutoModelForCausalLM")
    )
    console.console.print(
        f"\n  from {package} import {name}\n  model = {name}.from_pretrained({str(trainer.args.output_dir)!r})",
        markup=False,
        soft_wrap=True,
    )


def _checkpoint(name: str, trainer: DARTrainer) -> Path:
    if name != "latest":
        return Path(name)
    found = sorted(trainer.checkpoints.glob("step-*"), key=_step_of)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {trainer.checkpoints}")
    return found[-1]


def _step_of(folder: Path) -> int:
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else 0


def _quiet(config: DARConfig) -> None:
    """Libraries talk over each other otherwise; what matters comes as an error of ours, or as an event."""
    level = transformers.utils.logging.log_levels[str(config.log_level)]
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.disable_progress_bar()
    hub_logging.set_verbosity(level)
    datasets_logging.set_verbosity(level)
    disable_progress_bars()


# --- endings -------------------------------------------------------------------------------------------------------------


def _exit_code(error: DARError) -> int:
    kinds: tuple[tuple[type[DARError], ExitCode], ...] = (
        (RewardContractError, ExitCode.FAILED),
        (InvalidRequestError, ExitCode.USAGE),
        (ConfigurationError, ExitCode.USAGE),
        (CheckpointError, ExitCode.USAGE),
        (ServiceUnavailableError, ExitCode.UNAVAILABLE),
        (RewardError, ExitCode.UNAVAILABLE),
    )
    if isinstance(error, TrainingError) and error.param is not None:
        return ExitCode.USAGE
    return next((code for kind, code in kinds if isinstance(error, kind)), ExitCode.FAILED)


def _fail(text: str, code: int, error: DARError | None = None) -> int:
    sys.stderr.write(f"dar train: {' '.join(text.split())}\n")
    for problem in error.problems if error is not None else ():
        where = f"row {problem.row}" if problem.row is not None else problem.param
        sys.stderr.write(f"  {where}: {problem.message}\n" if where else f"  {problem.message}\n")
    return code
