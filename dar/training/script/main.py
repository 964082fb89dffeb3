"""``python -m dar.training``, which is also ``dar train``: a training run from a command line."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch
import transformers
from datasets.utils import logging as datasets_logging
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from dar.errors import DARError
from dar.output import expendable_output
from dar.protocol.checkpoints import MANIFEST_NAME, Manifest, checkpoint_folders
from dar.settings import load_settings
from dar.training.config.config import DARConfig
from dar.training.report.console import TrainingConsole
from dar.training.report.sink import StopKind
from dar.training.script.arguments import CommandLine, ScriptArguments
from dar.training.script.assembly import build, config_of
from dar.training.script.dry_run import PREVIEWED_PROMPTS, show_preview
from dar.training.script.exits import ScriptExit, end, fail, fail_by_function
from dar.training.script.flags import read_command_line
from dar.training.script.forecast import show_forecast
from dar.training.script.places import NEWEST, remove_earlier_run
from dar.training.script.run_lock import output_lock
from dar.training.script.usage import check_line
from dar.training.trainer import DARTrainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a known error becomes a message on stderr and an exit code.

    Args:
        arguments: Default: those of this process.
    """
    try:
        return run(read_command_line(sys.argv[1:] if arguments is None else arguments))
    except DARError as error:
        return fail(error)
    except torch.OutOfMemoryError as error:
        text = (
            f"the model does not fit into the GPU's memory: {error}; train an adapter (--use_peft) "
            "or lower --max_new_tokens"
        )
        return end(text, ScriptExit.FAILED)
    except OSError as error:  # a disk that is full, a file that may not be read
        place = f": {error.filename}" if error.filename else ""
        return end(f"{error.strerror or error}{place}", ScriptExit.FAILED)
    except KeyboardInterrupt:
        return end("interrupted before the first step; nothing was trained", ScriptExit.INTERRUPTED)
    except BaseException as error:  # noqa: BLE001 - a reward function may raise anything
        return fail_by_function(error)


def run(line: CommandLine) -> int:
    """Train, or do a dry run, as ``line`` says.

    Raises:
        DARError: The arguments cannot work, or training failed.
    """
    check_line(line)
    resume = line.config.get("resume_from_checkpoint")
    values = {k: v for k, v in line.config.items() if k != "resume_from_checkpoint"}
    with contextlib.ExitStack() as stack:
        if line.is_dry_run or line.is_forecast:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            # Making the trainer creates its folder, repository and trackers.
            values |= {"output_dir": folder, "push_to_hub": False, "report_to": "none"}
        config = config_of(values)
        _quiet(config)
        is_main = config.process_index == 0
        if not (line.is_dry_run or line.is_forecast):
            stack.enter_context(expendable_output())
            if is_main:
                stack.enter_context(output_lock(Path(str(config.output_dir))))
                check_line(line)  # another run may have ended there meanwhile
        console = TrainingConsole(line.script.sample_every)
        stop = StopSignals()
        with _status(console, "loading …", is_main):
            trainer = build(line.script, config, load_settings(), console, stop)
        if line.is_forecast:
            with _status(console, "sampling and scoring …", is_main):
                preview = trainer.calibration.preview()
            if is_main:
                show_forecast(preview, console.console, trainer.calibration.gain)
            return ScriptExit.DONE
        if line.is_dry_run:
            with _status(console, "sampling and scoring …", is_main):
                step = trainer.preview(PREVIEWED_PROMPTS)
            if is_main:
                show_preview(trainer, step, console.console, line.config)
            return ScriptExit.DONE
        if line.is_overwriting and is_main:
            remove_earlier_run(Path(str(config.output_dir)))
        checkpoint = None
        if resume is not None:
            is_newest = str(resume) in NEWEST
            checkpoint = (
                checkpoint_folders(trainer.checkpoints)[-1] if is_newest else Path(str(resume))
            )
        return _train(trainer, console, stop, checkpoint, line.script)


def _status(
    console: TrainingConsole, text: str, is_main: bool
) -> contextlib.AbstractContextManager[object]:
    return console.console.status(text) if is_main else contextlib.nullcontext()


class StopSignals:
    """Stops with a checkpoint at the first SIGINT, SIGTERM or SIGHUP.

    A second SIGINT or SIGTERM stops at once. SIGHUP never does, as one that closes a terminal may
    arrive twice, and before a SIGTERM. Under nohup it is ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def requested(self) -> StopKind | None:
        return None if self.received is None else "drain"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals while the context lasts."""
        handled = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handled.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._receive) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        elif number != signal.SIGHUP:
            if self.received != signal.SIGHUP:
                raise SystemExit(128 + number)
            self.received = number


# --- training ------------------------------------------------------------------------------------


def _train(
    trainer: DARTrainer,
    console: TrainingConsole,
    stop: StopSignals,
    resume: Path | None,
    script: ScriptArguments,
) -> int:
    is_main, start = trainer.ranks.is_main, 0 if resume is None else _step_of(resume)
    if is_main:
        console.begin(trainer.args.max_steps, start)
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
    trainer.save_model(
        _internal_call=True
    )  # without a push, which follows with the data set's name
    if trainer.args.push_to_hub:
        trainer.push_to_hub("End of training", dataset=script.dataset_name)
    if is_main:
        console.summary(
            _headline(total - start, console.empty_steps, start), _where(trainer, console)
        )
        _say_how_to_load(console, trainer)
    return ScriptExit.DONE


def _headline(done: int, empty: int, start: int) -> str:
    """The outcome of ``done`` steps, of which ``empty`` had no two rewards to compare."""
    after = f" after step {start}" if start else ""
    if done == 0:
        return f"The run was complete{after}; nothing was left to train."
    if empty >= done:
        return f"Nothing was trained: {_steps(done)}{after} without two rewards to compare."
    without = f"; {_steps(empty)} had no two rewards to compare" if empty else ""
    return f"Trained {_steps(done - empty)}{after}{without}."


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _say_interrupted(console: TrainingConsole, step: int, total: int) -> None:
    folder = console.newest_checkpoint
    if folder is None:
        headline, facts = f"Stopped at step {step} of {total}; there was nothing new to save.", {}
    else:
        headline = f"Stopped after step {step} of {total}; a checkpoint was written."
        facts = {
            "checkpoint": str(folder),
            "resume": f"the same command with --resume_from_checkpoint {folder}",
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
        f"\n  from {package} import {name}\n"
        f"  model = {name}.from_pretrained({str(trainer.args.output_dir)!r})",
        markup=False,
        soft_wrap=True,
    )


def _step_of(folder: Path) -> int:
    """Step of a checkpoint, whatever its folder is called; 0 if it is damaged."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes()).step
    except (OSError, ValueError):
        return 0  # the trainer says what is wrong with it


def _quiet(config: DARConfig) -> None:
    """Silence libraries; all that matters is raised as a `DARError` or reported as an event."""
    level = transformers.utils.logging.log_levels[str(config.log_level)]
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.disable_progress_bar()
    hub_logging.set_verbosity(level)
    datasets_logging.set_verbosity(level)
    disable_progress_bars()
