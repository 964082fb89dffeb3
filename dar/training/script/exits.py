"""How ``dar train`` ends without a model: exit codes, and errors in the words of its flags.

Importing this module loads no torch.
"""

import re
import sys
import traceback
from collections.abc import Mapping
from enum import IntEnum

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
from dar.rewards import functions

REWARD_FLAGS = "--reward_url, --reward_function or --reward_model_name_or_path"
FLAGS: Mapping[str, str] = {
    "train_dataset": "--dataset_name",
    "training_file": "--dataset_name",
    "eval_dataset": "--eval_dataset_name",
    "validation_file": "--eval_dataset_name",
    "reward_funcs": REWARD_FLAGS,
    "reward_model": "--reward_model_name_or_path",
    "reward_weights": "--reward_weights",
    "peft_config": "--use_peft",
    "report_to": "--report_to",
    "resume_from_checkpoint": "--resume_from_checkpoint",
}
"""Arguments of `dar.DARTrainer`, and fields of a job, by whose names errors speak of them."""


class ScriptExit(IntEnum):
    """Exit codes; those of ``sysexits.h`` where one fits."""

    DONE = 0
    FAILED = 1
    USAGE = 64
    """The input cannot work: other arguments, data or models are needed."""
    UNAVAILABLE = 69
    """The hub or a reward service cannot be reached; the same command may work later."""
    INTERRUPTED = 130


def fail(error: DARError) -> int:
    """Show an error on stderr. Returns the exit code."""
    code = end(error.message, exit_code(error))
    # The message says the first one already.
    for problem in error.problems if len(error.problems) > 1 else ():
        where = f"row {problem.row}" if problem.row is not None else problem.param
        text = in_flags(problem.message)
        sys.stderr.write(f"  {where}: {text}\n" if where else f"  {text}\n")
    return code


def end(text: str, code: int) -> int:
    """Show a message on stderr as one paragraph. Returns ``code``."""
    sys.stderr.write(f"dar train: {' '.join(in_flags(text).split())}\n")
    return code


def fail_by_function(error: BaseException) -> int:
    """Show an exception of a user's reward function, with its own part of the traceback.

    Returns:
        The exit code.

    Raises:
        BaseException: It came from elsewhere.
    """
    frames = traceback.extract_tb(error.__traceback__)
    calls = [place for place, one in enumerate(frames) if one.filename == functions.__file__]
    if not calls:
        raise error
    sys.stderr.writelines(traceback.format_list(frames[calls[-1] + 1 :]))
    text = f"the reward function raised {type(error).__name__}: {error}"
    return end(f"{text}; nothing is trained without its rewards", ScriptExit.FAILED)


def in_flags(text: str) -> str:
    """``text`` with the names of flags in place of those of the trainer's arguments."""
    names = "|".join(FLAGS)
    return re.sub(rf"(?<![\w./-])({names})(?![\w./-]|=)", lambda found: FLAGS[found[1]], text)


def exit_code(error: DARError) -> ScriptExit:
    """The exit code for an error."""
    kinds: tuple[tuple[type[DARError], ScriptExit], ...] = (
        (RewardContractError, ScriptExit.FAILED),
        (InvalidRequestError, ScriptExit.USAGE),
        (ConfigurationError, ScriptExit.USAGE),
        (CheckpointError, ScriptExit.USAGE),
        (ServiceUnavailableError, ScriptExit.UNAVAILABLE),
        (RewardError, ScriptExit.UNAVAILABLE),
    )
    if isinstance(error, TrainingError) and error.param is not None:
        return ScriptExit.USAGE
    return next((code for kind, code in kinds if isinstance(error, kind)), ScriptExit.FAILED)
