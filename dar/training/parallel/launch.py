"""Starting the processes of a training run: by a launcher, or as a job spec says."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.spec import Resources
from dar.protocol.spec_checks import ONE_PROCESS
from dar.settings import inherited_environment
from dar.training.parallel import deepspeed_config

_MEETING = ("ACCELERATE_USE_CPU", "MASTER_ADDR")
_MEMBERSHIP = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_left_alone() -> bool:
    """Whether ``accelerate launch --cpu`` should start several processes and started only this one.

    It leaves the others to MPI, which is not used without ``--mpirun_hostfile``.
    """
    given = inherited_environment((*_MEETING, *_MEMBERSHIP))
    return all(name in given for name in _MEETING) and not any(
        name in given for name in _MEMBERSHIP
    )


def refuse_if_left_alone() -> None:
    """Refuse to train in one process if several were requested.

    Raises:
        InvalidRequestError: Several were requested; see `is_left_alone`.
    """
    if is_left_alone():
        raise InvalidRequestError(
            "accelerate should start several processes on CPUs and started one, because it starts "
            "the others by MPI only; use `torchrun --nproc-per-node N script.py`, or "
            "`python -m dar.training`, which starts them itself"
        )


def start_all_processes() -> None:
    """Replace this process by torchrun with the same command line, if accelerate left it alone.

    Otherwise, or if accelerate's command line does not name their number, it returns.
    """
    count = _wanted_processes(os.getppid()) if is_left_alone() else None
    if count is not None:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
        os.execv(sys.executable, [sys.executable, *launcher, *sys.orig_argv[1:]])  # noqa: S606 - no shell is wanted


def _wanted_processes(launcher: int) -> int | None:
    """The value of ``--num_processes`` on the command line of process ``launcher``."""
    try:
        line = Path(f"/proc/{launcher}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (OSError, UnicodeDecodeError):  # not Linux, or another user's
        return None
    found = re.search(r" --num[_-]processes[= ](\d+) ", line)
    return None if found is None else int(found.group(1))


def strategy_options(resources: Resources) -> dict[str, Any]:
    """Arguments of `dar.DARConfig` for the strategy of a job spec.

    Raises:
        TrainingError: The strategy needs several processes, or cannot be used on this worker.
    """
    if resources.strategy in ("auto", "ddp"):
        return {}
    if resources.processes == 1:
        raise TrainingError(
            ONE_PROCESS.format(resources.strategy),
            param="method.dar.resources.strategy",
        )
    if resources.strategy == "fsdp":
        return {"fsdp": True}
    if not deepspeed_config.is_installed():
        raise TrainingError(
            f"strategy {resources.strategy!r} needs DeepSpeed, which is not installed on this "
            f"worker; {deepspeed_config.INSTALLATION} there, or send fsdp, which shards the "
            "same as zero3",
            param="method.dar.resources.strategy",
        )
    return {"deepspeed": deepspeed_config.config_of(resources.strategy)}
