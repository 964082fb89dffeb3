"""`RunContext`: what the parts of a training run share, so that each gets it in one argument."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from dar.protocol.worker import Phase
from dar.training.config.config import DARConfig
from dar.training.model.loading import LanguageModel
from dar.training.parallel.ranks import Ranks
from dar.training.report.sink import AFTER_STEP, Control, Sink, StopKind, StopRequestedError, check


class HostTrainer(Protocol):
    """What the parts use of `transformers.Trainer`, with the types that `dar.DARTrainer` gives it.

    transformers replaces several of these while it trains (FSDP replaces ``model``), so they are
    read where they are needed and never kept.
    """

    args: DARConfig
    model: LanguageModel
    processing_class: PreTrainedTokenizerBase
    optimizer: Optimizer
    lr_scheduler: LambdaLR
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    accelerator: Any
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    hub_model_id: str | None
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class RunContext:
    """The trainer and its processes, and where a run reports to and listens."""

    trainer: HostTrainer
    ranks: Ranks
    """The processes that train together. The main one scores, reports and writes."""
    sink: Sink
    """Drops everything on the other processes."""
    control: Control
    """Never requests a stop on the other processes."""
    job_id: str | None
    """Sent to reward services."""

    def phase(self, phase: Phase, message: str | None = None) -> None:
        """Report the present phase, with the steps that are done; the one under way is not."""
        self.sink.phase(phase, self.trainer.state.global_step, message)

    def stop_if(self, reasons: tuple[StopKind, ...]) -> None:
        """Stop if one of ``reasons`` is requested; a collective, so all processes stop or none.

        Raises:
            StopRequestedError: A stop is requested.
        """
        if self.ranks.from_main(self.control.requested) in reasons:
            raise StopRequestedError

    def poll(self) -> None:
        """Check for a stop and for failed processes; no collective.

        Raises:
            StopRequestedError: A stop is requested, on this process or another.
        """
        check(self.control)
        self.ranks.look()

    def should_stop(self) -> bool:
        """Whether to drop the step; raises the error of another process that has failed."""
        self.ranks.look()
        return self.control.requested() not in AFTER_STEP
