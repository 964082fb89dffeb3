"""`DARTrainer`: `transformers.Trainer` does the optimizer steps, a step source brings the scored completions."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from dar.errors import InvalidRequestError, RewardError
from dar.protocol.reward_spec import Rewards
from dar.rewards.scoring.failures import FailureBudget
from dar.training.checkpoint.fingerprint import config_sha256
from dar.training.config.config import DARConfig, preset_values
from dar.training.config.ignored import online_only
from dar.training.data.rows import DataCollatorForDAR, Rows, check_rows, check_table
from dar.training.evaluation import (
    ComputeMetrics,
    Predictions,
    check_evaluation_rows,
)
from dar.training.model.logprobs import idle_weights
from dar.training.model.policy import Policy
from dar.training.model.reward_model import RewardModels
from dar.training.parallel.launch import refuse_if_left_alone
from dar.training.parallel.ranks import Ranks
from dar.training.report.capacity import Capacity
from dar.training.report.sink import Control, NullControl, NullSink, Sink, StopRequestedError
from dar.training.reward_sources import GivenRewards, RewardAccess, RewardFunctions
from dar.training.step.metrics import Reporter
from dar.training.step.pipeline import Pipeline
from dar.training.step.records import ScoredStep
from dar.training.step.scoring import ScoringTrainer

logger = logging.getLogger(__name__)
__all__ = ["DARTrainer", "Predictions", "RewardFunctions"]


class DARTrainer(ScoringTrainer):
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

    A data set whose rows hold completions and rewards is trained on as it stands
    (`dar.training.step.offline.ReplaySource`); no reward function is given then.

    Checkpoints lie in ``output_dir/checkpoints/step-<n>``; ``train(resume_from_checkpoint=folder)`` goes on from one as if
    nothing had happened: on a CPU, to the last bit. The reference is always made from ``model``, never from a checkpoint.

    Args:
        model: Folder or hub id, or a model; it is trained in place.
        args: All hyperparameters.
        train_dataset: Rows with a ``prompt`` (a text or a list of messages); other columns go to the reward function. Offline: rows
            of `dar.protocol.rows`, with completions and rewards, or ``chosen`` and ``rejected``; their number of completions may
            differ.
        reward_funcs: What gives rewards: a function ``f(prompts, completions, **columns)`` of TRL's signature, sync or async, the
            URL of a reward service, a list of these, or the rewards of a job spec.
        eval_dataset: Rows that the policy is tried on, or several data sets by name; of the same kind as ``train_dataset``.
            ``args.eval_strategy``, ``eval_steps``, ``eval_delay`` and ``eval_on_start`` say when, besides `evaluate`.
        compute_metrics: Further metrics of an evaluation: takes `Predictions`, returns numbers by name.
        reward_model: Gives rewards too: folder or hub id of a sequence classifier with one label, such a model, or a list. With the
            rewards of a job spec: where its reward models lie, by component name, if not where the spec says.
        reward_processing_class: The reward model's tokenizer, or a list; default: the one beside it.
        reward_weights: Factor of each reward in their sum, those of ``reward_funcs`` first; default 1.
        reward_secret: Signs requests to reward services (``whsec_…``).
        reward_access: How the reward services of a job spec are reached; a training service gives it.
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
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        compute_metrics: ComputeMetrics | None = None,
        reward_model: RewardModels | Mapping[str, str | Path | PreTrainedModel] | None = None,
        reward_processing_class: PreTrainedTokenizerBase
        | Sequence[PreTrainedTokenizerBase | None]
        | None = None,
        reward_weights: Sequence[float] | None = None,
        reward_secret: str | None = None,
        reward_access: RewardAccess | None = None,
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
        check_table(train_dataset)
        args = args or DARConfig(output_dir="dar-output")
        config = _settled(args, len(train_dataset), reward_funcs)
        given = GivenRewards.of(
            reward_funcs, reward_model, reward_processing_class, reward_weights, reward_secret, config, reward_access,
        )  # fmt: skip
        _check_data(train_dataset, eval_dataset, config, is_replay=not given.is_online)
        policy = Policy.make(
            model, config, tokenizer=processing_class, ref_model=ref_model, peft_config=peft_config,
            base_name=base_name, is_offline=is_offline,
        )  # fmt: skip
        is_using_cache = policy.model.config.use_cache
        super().__init__(
            model=policy.model, args=config, data_collator=DataCollatorForDAR(), callbacks=callbacks,
            train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=policy.tokenizer,
        )  # fmt: skip
        # transformers turns the cache off for training, and would write that into every checkpoint
        policy.model.config.use_cache = is_using_cache
        policy.place_reference(config.device)
        self._leave_unused_alone()
        self._policy = policy
        self._compute = compute_metrics
        self._job_id = job_id
        self._reporter = Reporter()
        self._meet(sink, control)
        if given.is_online and (why := config.convergence_problem):
            self.sink.event("warn", why, {"kind": "no_point_of_rest", "coldest": config.coldest})
        self._rewards = given.load(self.ranks, config.device, is_offline=is_offline)
        self._identify(base_name or (model if isinstance(model, str) else model.name_or_path))

    def _identify(self, name: str | None) -> None:
        """Say what this run is: to its checkpoints, and to the model card with the model's name."""
        terms = self._rewards.terms()
        self.config_sha256 = config_sha256(
            self.args, self._policy.model, self.train_dataset, self._policy.base_sketch, terms
        )
        self.describe(name, [str(term["name"]) for term in terms])

    def _leave_unused_alone(self) -> None:
        """Have DDP look for weights without a gradient only where there are any: it takes time, and torch warns of it."""
        handler = self.accelerator.ddp_handler
        is_ddp = self.args.world_size > 1 and not (
            self.is_fsdp_enabled or self.is_deepspeed_enabled
        )
        if is_ddp and self.args.ddp_find_unused_parameters is None and not idle_weights(self.model):
            handler.find_unused_parameters = False

    def _meet(self, sink: Sink | None, control: Control | None) -> None:
        """Find the other processes; one speaks and listens for all."""
        self.ranks = Ranks.of_launch(self.args.process_index, self.args.world_size)
        is_main = self.ranks.is_main
        self.sink = (sink if is_main else None) or NullSink()
        self._control: Control = (control if is_main else None) or NullControl()

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

        Returns:
            Steps done, and transformers' own figures of the run.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to other arguments.
            RewardError: No completion of a step could be scored.
            TrainingError: The loss or the policy is no number, or three steps in a row had no usable reward.
        """
        self.stopped_by = None
        try:
            with self.ranks.together():
                return self._train_together(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except StopRequestedError:
            # What was begun is dropped; nothing has changed since the last step edge.
            self.stopped_by = self.ranks.from_main(self._control.requested)
            if self.stopped_by == "drain" and self.state.global_step > self.published_step:
                self._save_checkpoint(self.model, None)
            return TrainOutput(self.state.global_step, math.nan, {})
        except RewardError:
            # As after a drain: the job may go on from here when there are rewards again.
            if self.state.global_step > self.published_step:
                self._save_checkpoint(self.model, None)
            raise
        finally:
            self.is_in_train = False

    def _train_together(
        self,
        resume_from_checkpoint: str | Path | bool | None,
        trial: Any,  # noqa: ANN401 - the signature of transformers
        ignore_keys_for_eval: list[str] | None,
    ) -> TrainOutput:
        policy = self._rewards.failure
        self._budget = self._capacity = self._budget_state = None
        self._has_budget = policy is not None
        if self.ranks.is_main:
            self._budget = None if policy is None else FailureBudget(policy)
            self._capacity = Capacity(self._rewards.concurrency(), self.sink)
        if len(set(self.ranks.gather(self.config_sha256))) > 1:
            raise InvalidRequestError(
                "the processes of this training run have different arguments, data or base models; give all the same"
            )
        with self._scoring():
            self._pipeline = Pipeline(
                self._source_of(self.train_dataset, "train"),
                overlap=self.args.overlap,
                last_step=self.args.max_steps,
            )
            with self._evaluating():
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def preview(self, prompts: int = 2) -> ScoredStep:
        """Sample and score the prompts that a run would begin with; nothing is trained or written.

        Args:
            prompts: How many; at least one for each process.

        Raises:
            RewardError: No completion could be scored.
            TrainingError: The model cannot be sampled from.
        """
        config = copy.copy(self.args)
        config.per_device_train_batch_size = math.ceil(prompts / self.ranks.count)
        config.gradient_accumulation_steps = 1
        with self.ranks.together(), self._scoring():
            step = self._source_of(self.train_dataset, "train", config)(1)
            rows = step.valid_rows
            if rows:
                step.policy_logps_B[rows] = self._policy_logps([step.pairs[row] for row in rows])
        return step

    def memory(self) -> dict[str, int]:
        """Bytes that stay in the memory of the main process, by what they hold; activations come on top."""
        trained = [p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad]
        held = {
            "model": module_bytes(self.model),
            "reference": module_bytes(self._policy.reference),
            "reward models": sum(model.size_bytes for model in self._rewards.models),
            "gradients": sum(trained),
            "AdamW's moments": 2 * sum(trained) if "adamw" in str(self.args.optim).lower() else 0,
        }
        return {name: size for name, size in held.items() if size}


def module_bytes(module: nn.Module | None) -> int:
    """Memory of a module's weights; 0 for none."""
    return 0 if module is None else sum(p.numel() * p.element_size() for p in module.parameters())


def _check_data(
    rows: Rows, evaluated: Rows | Mapping[str, Rows] | None, config: DARConfig, *, is_replay: bool
) -> None:
    check_rows(rows, is_replay=is_replay)
    if is_replay and (names := online_only(config, preset_values(config.preset))):
        # Not refused, as a config is often shared by online and offline runs of one script.
        logger.warning(
            "%s: without effect, as there is no reward source and completions are read from the data set",
            ", ".join(names),
        )
    if config.overlap == "one_step" and is_replay:
        raise InvalidRequestError(
            "overlap='one_step' samples one step ahead, but the data hold their completions; leave it out",
            param="overlap",
        )
    check_evaluation_rows(evaluated, is_replay=is_replay, is_needed=config.is_evaluating)


def _settled(config: DARConfig, row_count: int, rewards: RewardFunctions | None) -> DARConfig:
    """A copy of ``config`` whose length is counted in steps, with what the rewards of a job spec say of ties.

    The last batch of an epoch runs on into the next.
    """
    refuse_if_left_alone()
    for name, is_set in (("fsdp", config.fsdp), ("deepspeed", config.deepspeed_plugin)):
        if is_set and config.world_size == 1:
            raise InvalidRequestError(
                f"{name} shares a model among processes, but there is one; start several (torchrun --nproc-per-node N …), "
                f"or leave {name} out",
                param=name,
            )
    config = copy.copy(config)
    if config.max_steps <= 0:
        prompts = config.num_train_epochs * row_count
        config.max_steps = max(1, math.ceil(prompts / config.prompts_per_step))
    if isinstance(rewards, Rewards):
        config.tie_tolerance = max(config.tie_tolerance, rewards.combine.tie_eps)
    config.ignore_data_skip = True  # the position in the data is a function of the step
    return config
