"""`DARTrainer`: `transformers.Trainer` does the optimizer steps, a step source brings the scored completions."""

import contextlib
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from dar.errors import InvalidRequestError
from dar.protocol.reward_spec import Rewards
from dar.rewards.functions import RewardFunction
from dar.rewards.scorer import RewardScorer, scorer_from_functions, scorer_from_spec
from dar.training.config import DARConfig
from dar.training.data import DataCollatorForDAR, Rows, TokenPair, check_rows
from dar.training.fingerprint import config_sha256, reward_terms
from dar.training.logprobs import all_logps
from dar.training.metrics import Reporter
from dar.training.policy import Policy
from dar.training.sink import (
    Control,
    NullControl,
    NullSink,
    Sink,
    StopRequestedError,
    check,
)
from dar.training.sources import make_source
from dar.training.stepping import StepTrainer
from dar.training.steps import Weigher

RewardFunctions = RewardFunction | str | Sequence[RewardFunction | str] | Rewards
"""A callable of TRL's signature, the URL of a reward service, a list of these, or the rewards of a job spec."""


class DARTrainer(StepTrainer):
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
        self._control: Control = control or NullControl()
        self._policy = policy
        self._rewards = (reward_funcs, reward_weights, reward_secret)
        self._job_id = job_id
        self._reporter = Reporter(clip=config.dar_wclip)

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
