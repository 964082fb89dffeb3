"""`DARTrainer`: `transformers.Trainer` does the optimizer steps, a step source brings the scored completions."""

import contextlib
import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.spec import Rewards
from dar.rewards.functions import RewardFunction
from dar.rewards.scorer import RewardScorer, scorer_from_functions, scorer_from_spec
from dar.training.config import DARConfig
from dar.training.data import DataCollatorForDAR, Rows, TokenPair, check_rows
from dar.training.fingerprint import config_sha256, reward_terms
from dar.training.logprobs import all_logps, completion_logps, forward_batches
from dar.training.loss import dar_loss
from dar.training.metrics import Reporter
from dar.training.policy import Policy
from dar.training.resumable import ResumableTrainer
from dar.training.sink import (
    Control,
    NullControl,
    NullSink,
    Request,
    Sink,
    StopRequestedError,
    check,
)
from dar.training.sources import make_source
from dar.training.steps import ScoredStep, StepShare, StepSource, Weigher

RewardFunctions = RewardFunction | str | Sequence[RewardFunction | str] | Rewards
"""A callable of TRL's signature, the URL of a reward service, a list of these, or the rewards of a job spec."""

MOST_EMPTY_STEPS = 3
"""Steps in a row without two usable rewards after which training gives up."""
LOG_HISTORY = 1000
"""Reports that `transformers.TrainerState` keeps; it is written into every checkpoint."""


class DARTrainer(ResumableTrainer):
    """Trains a language model by Direct Advantage Regression on its own samples.

    ```python
    from dar import DARConfig, DARTrainer

    def reward(prompts, completions, **columns):
        return [float("because" in completion) for completion in completions]

    trainer = DARTrainer(
        model="Qwen/Qwen2-0.5B-Instruct",
        args=DARConfig(output_dir="out", learning_rate=5e-7, dar_k=4),
        train_dataset=[{"prompt": "Why is the sky blue?"}, …],
        reward_funcs=reward,          # or "https://my-reward-service/score"
    )
    trainer.train()
    ```

    A data set whose rows hold ``completion_ids`` and ``rewards`` is trained on as it stands
    (`dar.training.sources.ReplaySource`); no reward function is given then.

    Checkpoints lie in ``output_dir/checkpoints/step-<n>``; ``train(resume_from_checkpoint=folder)`` goes on from one as if
    nothing had happened: on a CPU, to the last bit. The reference is always made from ``model``, never from a checkpoint.

    Args:
        model: Folder or hub id, or a model; it is trained in place.
        args: All hyperparameters.
        train_dataset: Rows with a ``prompt`` (a text or a list of messages); other columns go to the reward function.
        reward_funcs: What gives rewards.
        reward_weights: Factor of each reward in their sum; default 1.
        reward_secret: Signs requests to reward services (``whsec_…``).
        processing_class: The model's tokenizer; default: the one beside ``model``.
        ref_model: The frozen reference; default: ``model`` as it is now, or without its adapter.
        peft_config: Trains an adapter instead of the weights.
        callbacks: Further callbacks of transformers.
        sink: Is told everything that happens.
        control: Is asked whether to go on.
        base_name: What an adapter calls its base model; default: the name of ``model``.
        job_id: Named to reward services.
        is_offline: Whether the model hub may not be asked.

    Raises:
        InvalidRequestError: The data set or a combination of arguments cannot work.
        TrainingError: The model cannot be loaded.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: DARConfig | None = None,
        train_dataset: Rows | None = None,
        reward_funcs: RewardFunctions | None = None,
        *,
        reward_weights: Sequence[float] | None = None,
        reward_secret: str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        sink: Sink | None = None,
        control: Control | None = None,
        base_name: str | None = None,
        job_id: str | None = None,
        is_offline: bool = False,
    ) -> None:
        if train_dataset is None:
            raise InvalidRequestError("train_dataset is missing: give rows with a prompt")
        check_rows(train_dataset, is_replay=reward_funcs is None)
        config = _settled(args or DARConfig(output_dir="dar-output"), len(train_dataset))
        policy = Policy.make(
            model,
            config,
            tokenizer=processing_class,
            ref_model=ref_model,
            peft_config=peft_config,
            base_name=base_name,
            is_offline=is_offline,
        )
        is_using_cache = policy.model.config.use_cache
        super().__init__(
            model=policy.model,
            args=config,
            data_collator=DataCollatorForDAR(),
            train_dataset=train_dataset,
            processing_class=policy.tokenizer,
            callbacks=callbacks,
        )
        # transformers turns the cache off for training, and would write that into every checkpoint
        policy.model.config.use_cache = is_using_cache
        policy.place_reference(config.device)
        self.sink = sink or NullSink()
        terms = reward_terms(reward_funcs, reward_weights)
        self.config_sha256 = config_sha256(
            config, policy.model, train_dataset, policy.base_sketch, terms
        )
        self.stopped_by: Request | None = None
        """What ended `train` before its time."""
        self._control: Control = control or NullControl()
        self._policy = policy
        self._rewards = (reward_funcs, reward_weights, reward_secret)
        self._job_id = job_id
        self._reporter = Reporter(clip=config.dar_wclip)
        self._source: StepSource | None = None
        self._step: ScoredStep | None = None
        self._empty_steps = 0

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,  # noqa: ANN401 - the signature of transformers
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to the last step, or until a stop is requested (then `stopped_by` says so).

        Args:
            resume_from_checkpoint: A checkpoint folder of a trainer with the same arguments.
            trial: Not used.
            ignore_keys_for_eval: Not used.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to other arguments.
            RewardError: No completion of a step could be scored.
            TrainingError: The loss or the policy is no number, or three steps in a row had no usable reward.
        """
        self.stopped_by = None
        with contextlib.ExitStack() as stack:
            weigher = Weigher(
                self.args,
                self._reference_logps if self.args.alpha > 0 else None,
                self._policy_logps,
            )
            self._source = make_source(
                self._policy,
                self.args,
                self.train_dataset,
                weigher,
                scorer=self._open_scorer(stack),
                job_id=self._job_id,
                sink=self.sink,
                control=self._control,
            )
            try:
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            except StopRequestedError:
                # What was begun is dropped; nothing has changed since the last step edge.
                self.stopped_by = self._control.requested()
                if self.stopped_by == "drain" and self.state.global_step > self.published_step:
                    self._save_checkpoint(self.model, None)
                return TrainOutput(self.state.global_step, math.nan, {})
            finally:
                self.is_in_train = False

    # --- what comes before the gradient ------------------------------------------------------------------------------

    def _open_scorer(self, stack: contextlib.ExitStack) -> RewardScorer | None:
        functions, weights, secret = self._rewards
        if functions is None:
            return None
        if isinstance(functions, Rewards):
            scorer = scorer_from_spec(
                functions, secret=secret, job_id=self._job_id, on_wait=self._tell_waiting
            )
        else:
            scorer = scorer_from_functions(
                functions, weights=weights, secret=secret, on_wait=self._tell_waiting
            )
        return stack.enter_context(scorer)

    def _tell_waiting(self, message: str) -> None:
        self.sink.phase("waiting_for_reward", self.state.global_step + 1, message)

    def _logps(self, model: nn.Module, pairs: Sequence[TokenPair]) -> Tensor:
        return all_logps(
            model,
            pairs,
            collate=self.data_collator,
            vocabulary=self._policy.vocabulary,
            is_bf16=self.args.bf16,
            before_each=lambda: check(self._control),
        )

    def _policy_logps(self, pairs: Sequence[TokenPair]) -> Tensor:
        return self._logps(self.model, pairs)

    def _reference_logps(self, pairs: Sequence[TokenPair]) -> Tensor:
        if self._policy.reference is not None:
            return self._logps(self._policy.reference, pairs)
        assert isinstance(self.model, PeftModel)
        with self.model.disable_adapter():
            return self._logps(self.model, pairs)

    # --- a step, as transformers' loop goes through it ---------------------------------------------------------------

    def get_train_dataloader(self) -> Any:  # noqa: ANN401 - transformers asks for a DataLoader but only iterates
        """Endless and empty: a step's data come from the step source when the step begins, never earlier."""
        return itertools.repeat(None)

    def get_batch_samples(
        self,
        epoch_iterator: Any,  # noqa: ANN401, ARG002 - the signature of transformers
        num_batches: int,
        device: torch.device,  # noqa: ARG002 - the signature of transformers
    ) -> tuple[list[Any], None]:
        """Begin a step: its completions, sampled and scored, in ``num_batches`` shares."""
        assert self._source is not None
        check(self._control)
        self._reporter.begin_step()
        self._step = self._source(self.state.global_step + 1)
        return list(self._step.shares(num_batches)), None

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,  # noqa: ANN401 - a `StepShare`; transformers hands on what `get_batch_samples` gave
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002 - the signature of transformers
    ) -> Tensor:
        """Backward passes of a share, scaled so that all shares together give the mean over the step.

        Returns:
            The share's part of the loss, detached.

        Raises:
            TrainingError: The loss is no number.
            StopRequestedError: The job was cancelled.
        """
        share: StepShare = inputs
        step, device = share.step, self.args.device
        model.train()
        total = torch.zeros((), device=device)
        pairs = [step.pairs[row] for row in share.rows]
        for places in forward_batches(pairs, self._policy.vocabulary):
            if self._control.requested() == "cancel":
                raise StopRequestedError
            rows = [share.rows[place] for place in places]
            batch = self.data_collator([pairs[place] for place in places])
            logps_B = completion_logps(model, {k: v.to(device) for k, v in batch.items()})
            loss = dar_loss(step.weights_B[rows].to(device), logps_B)
            loss = loss * (len(rows) / step.valid_count)
            if not loss.isfinite():
                raise _not_a_number("loss", step.number)
            self.accelerator.backward(loss)
            step.policy_logps_B[rows] = logps_B.detach().cpu()
            total += loss.detach()
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:  # noqa: ANN401 - as transformers
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]  # transformers is only partly typed
        if not math.isfinite(float(norm)):
            raise _not_a_number("gradient", self.state.global_step + 1)
        return norm

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ANN401, ARG002 - the signature of transformers
        """Not counted: the estimate of transformers knows nothing of sampling."""
        return 0

    # --- what is reported of a step ----------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Any,  # noqa: ANN401 - as transformers
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        if self._step is not None:
            self._end_step(self._step, float(grad_norm or 0.0), float(learning_rate or 0.0))
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def _end_step(self, step: ScoredStep, grad_norm: float, learning_rate: float) -> None:
        self._step = None
        self.state.epoch = step.epoch
        self._reporter.end_step(step, grad_norm=grad_norm, learning_rate=learning_rate)
        self._count_empty(step)
        self.stopped_by = self._control.requested()
        if self.stopped_by == "cancel":
            raise StopRequestedError
        if self.stopped_by == "drain":
            self.control.should_save = self.control.should_training_stop = True
        if self.stopped_by or self.state.global_step >= self.state.max_steps:
            self.control.should_log = True

    def _count_empty(self, step: ScoredStep) -> None:
        if step.valid_count:
            self._empty_steps = 0
            return
        self._empty_steps += 1
        message = next((reward.message for reward in step.rewards if reward.message), None)
        self.sink.event(
            "warn",
            f"step {step.number} had no two rewards to compare, so it changed nothing"
            + (f"; the reward source says: {message}" if message else ""),
            {"kind": "empty_step", "step": step.number},
        )
        if self._empty_steps >= MOST_EMPTY_STEPS:
            raise TrainingError(
                f"the last {MOST_EMPTY_STEPS} steps had no usable rewards: nearly every completion was skipped or failed; "
                "check what the reward service answers",
                code="no_rewards",
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report to the sink and, with DAR's metrics, to the callbacks of transformers."""
        if self._reporter.is_due:
            values = self._reporter.report(self.sink, self.state.global_step)
            logs = logs | values | {"loss": values.get("dar/loss", 0.0)}
        super().log(logs, start_time)
        del self.state.log_history[:-LOG_HISTORY]

    # --- what a resume needs of it -----------------------------------------------------------------------------------

    def step_values(self) -> dict[str, float]:
        """The last report."""
        return self._reporter.reported

    def own_state(self) -> dict[str, Any]:
        """Counters, and what has happened since the last report."""
        return {"empty_steps": self._empty_steps, "reporter": self._reporter.state()}

    def restore_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""
        self._empty_steps = state["empty_steps"]
        self._reporter.restore(state["reporter"])


def _settled(config: DARConfig, row_count: int) -> DARConfig:
    """A copy of ``config`` whose length is counted in steps; the last batch of an epoch runs on into the next."""
    if config.world_size > 1:
        raise InvalidRequestError("this trainer runs in one process; start it without a launcher")
    config = copy.copy(config)
    if config.max_steps <= 0:
        prompts = config.num_train_epochs * row_count
        config.max_steps = max(1, math.ceil(prompts / config.prompts_per_step))
    config.ignore_data_skip = True  # the position in the data is a function of the step
    return config


def _not_a_number(what: str, step: int) -> TrainingError:
    return TrainingError(
        f"the {what} of step {step} is not a finite number: training has diverged; lower learning_rate or dar_wclip, "
        "or raise beta, and start again from an earlier checkpoint",
        code="diverged",
    )
