"""How the processes of a training run come to be: what launchers leave undone, and what a job spec asks for."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.spec import Resources
from dar.settings import inherited_environment
from dar.training.parallel import deepspeed_config

_MEETING = ("ACCELERATE_USE_CPU", "MASTER_ADDR")
_MEMBERSHIP = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_left_alone() -> bool:
    """Whether ``accelerate launch --cpu`` was asked for several processes and has started only this one.

    It leaves the others to MPI, and without ``--mpirun_hostfile`` there is none.
    """
    told = inherited_environment((*_MEETING, *_MEMBERSHIP))
    return all(name in told for name in _MEETING) and not any(name in told for name in _MEMBERSHIP)


def refuse_if_left_alone() -> None:
    """Do not train in one process what was to be trained in several.

    Raises:
        InvalidRequestError: It is so.
    """
    if is_left_alone():
        raise InvalidRequestError(
            "accelerate was asked for several processes on CPUs and has started one, because without MPI it knows no other way; "
            "start them by `torchrun --nproc-per-node N script.py`, or train by `python -m dar.training`, which does so itself"
        )


def start_all_processes() -> None:
    """Become torchrun, with the command line of this process, where accelerate has started one process of several.

    Returns where there is nothing to do, or where accelerate's command line does not say how many are wanted.
    """
    count = _wanted_processes(os.getppid()) if is_left_alone() else None
    if count is not None:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
        os.execv(sys.executable, [sys.executable, *launcher, *sys.orig_argv[1:]])  # noqa: S606 - no shell is wanted


def _wanted_processes(launcher: int) -> int | None:
    """What stands after ``--num_processes`` on the command line of process ``launcher``."""
    try:
        line = Path(f"/proc/{launcher}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (OSError, UnicodeDecodeError):  # not Linux, or another user's
        return None
    found = re.search(r" --num[_-]processes[= ](\d+) ", line)
    return None if found is None else int(found.group(1))


def strategy_options(resources: Resources) -> dict[str, Any]:
    """Arguments of `dar.DARConfig` by which several processes share the work as a job spec says.

    Raises:
        TrainingError: One process has nobody to share with, or the strategy cannot be used here.
    """
    if resources.strategy in ("auto", "ddp"):
        return {}
    if resources.processes == 1:
        raise TrainingError(
            f"strategy {resources.strategy!r} shares a model among processes, but the job has one; send "
            "resources.processes of at least 2, or leave strategy at auto",
            param="method.dar.resources.strategy",
        )
    if resources.strategy == "fsdp":
        return {"fsdp": True}
    if not deepspeed_config.is_installed():
        raise TrainingError(
            f"strategy {resources.strategy!r} needs DeepSpeed, which this worker has not; {deepspeed_config.INSTALLATION} there, or "
            "send fsdp, which cuts weights, gradients and optimizer state into shards as zero3 does",
            param="method.dar.resources.strategy",
        )
    return {"deepspeed": deepspeed_config.config_of(resources.strategy)}
