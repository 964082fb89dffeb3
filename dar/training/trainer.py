"""`DARTrainer`: transformers' training loop over steps of sampled and scored completions."""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from dar.errors import InvalidRequestError, RewardError
from dar.protocol.checkpoints import RESUME_FOLDER
from dar.protocol.metrics import EVALUATION
from dar.rewards.from_spec import RewardAccess
from dar.training.argument_kinds import with_checked_kinds
from dar.training.calibration.calibration import Calibration
from dar.training.checkpoint.fingerprint import decisive_facts, part_digests
from dar.training.checkpoint.hub import HubPush, hub_errors, repository_name, tag_model
from dar.training.checkpoint.model_card import CardNotes
from dar.training.checkpoint.resume import RunCheckpoints
from dar.training.config.config import DARConfig
from dar.training.data.rows import DataCollatorForDAR, Rows, check_table
from dar.training.evaluation import ComputeMetrics, Predictions, RunEvaluation
from dar.training.model.loading import LanguageModel, check_trainable, unchanged_cache_option
from dar.training.model.policy import Policy
from dar.training.model.reward_model import RewardModels
from dar.training.optimization import OptimizingTrainer
from dar.training.parallel.ranks import Ranks
from dar.training.parallel.sharding import is_sharded
from dar.training.report.sink import (
    Control,
    LogSink,
    NullControl,
    NullSink,
    Sink,
    StopKind,
    StopRequestedError,
)
from dar.training.report.trackers import name_start_errors
from dar.training.reward_sources import (
    GivenRewards,
    LoadedRewards,
    RewardFunctions,
    RewardSession,
)
from dar.training.run_context import RunContext
from dar.training.run_setup import (
    check_data,
    choose_learning_rate,
    held_bytes,
    limit_search_for_unused,
    report_plan,
    settle_accelerator,
    settled_config,
)
from dar.training.step.loop import StepLoop, StepShare
from dar.training.step.metrics import Reporter
from dar.training.step.offline import ReplaySource
from dar.training.step.online import OnlineSource, make_source
from dar.training.step.passes import ForwardPasses
from dar.training.step.records import Mode, ScoredStep
from dar.training.step.reward_feed import Scoring

__all__ = ["DARTrainer", "Predictions", "RewardFunctions"]

LOG_HISTORY = 1000
"""Reports that `transformers.TrainerState` keeps; every checkpoint contains them."""


class DARTrainer(OptimizingTrainer):
    """Trains a language model by Direct Advantage Regression on its own samples.

    ```python
    from dar import DARConfig, DARTrainer

    def reward(prompts, completions, **columns):
        return [float("because" in completion) for completion in completions]

    trainer = DARTrainer(
        model="Qwen/Qwen2-0.5B-Instruct",
        args=DARConfig(output_dir="out", dar_k=4),
        train_dataset=[{"prompt": "Why is the sky blue?"}, …],
        reward_funcs=reward,          # or "https://my-reward-service/score"
    )
    trainer.train()
    ```

    A data set whose rows hold completions and rewards is trained on as it is
    (`dar.training.offline.ReplaySource`); then no reward function is given.

    Checkpoints are in ``output_dir/checkpoints/step-<n>``. ``train(resume_from_checkpoint=folder)``
    continues from one as if the run had not been interrupted: on a CPU, to the last bit. The
    reference is always made from ``model``, never from a checkpoint.

    Args:
        model: Folder or hub id, or a model; it is trained in place.
        args: All hyperparameters.
        train_dataset: Rows with a ``prompt`` (a text or a list of messages); other columns go to
            the reward function. Offline: rows of `dar.protocol.rows`, with completions and rewards,
            or ``chosen`` and ``rejected``; their number of completions may differ.
        reward_funcs: The rewards: a function ``f(prompts, completions, **columns)`` of TRL's
            signature, sync or async, the URL of a reward service, a list of these, or the rewards
            of a job spec.
        eval_dataset: Rows that the policy is evaluated on, or several data sets by name; of the
            same kind as ``train_dataset``. ``args.eval_strategy``, ``eval_steps``, ``eval_delay``
            and ``eval_on_start`` set when; `evaluate` evaluates at any time.
        compute_metrics: Further metrics of an evaluation: takes `Predictions`, returns numbers by
            name.
        reward_model: Another source of rewards: folder or hub id of a sequence classifier with one
            label, such a model, or a list. With the rewards of a job spec: the folder or hub id of
            its reward models by component name, where it differs from the spec.
        reward_processing_class: The reward model's tokenizer, or a list; default: the one beside
            it.
        reward_weights: Factor of each reward in their sum, those of ``reward_funcs`` first; default
            1.
        reward_secret: Signs requests to reward services (``whsec_…``).
        reward_access: How the reward services of a job spec are reached; set by a training service.
        processing_class: The model's tokenizer; default: the one beside ``model``.
        ref_model: The frozen reference; default: ``model`` as it is now, or without its adapter.
        peft_config: Trains an adapter instead of the weights.
        callbacks: Further callbacks of transformers.
        sink: Receives metrics, samples, events and checkpoints; default: warnings are logged.
        control: Requests a stop.
        base_name: The base model's name in an adapter; default: the name of ``model``.
        job_id: Sent to reward services.
        is_offline: Whether access to the model hub is forbidden.

    Raises:
        InvalidRequestError: The data set or a combination of arguments cannot work.
        TrainingError: The model cannot be loaded.
    """

    # More precise types than those of transformers:
    args: DARConfig
    model: LanguageModel
    processing_class: PreTrainedTokenizerBase
    optimizer: Optimizer
    lr_scheduler: LambdaLR
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    deepspeed: Any
    hub_model_id: str | None  # type: ignore[assignment]  # transformers annotates the None it starts with

    @with_checked_kinds
    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
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
        model = str(model) if isinstance(model, Path) else model
        args = args or DARConfig(output_dir="dar-output")
        access = replace(reward_access or RewardAccess(), secret=reward_secret)
        given = GivenRewards.of(
            reward_funcs, reward_model, reward_processing_class, reward_weights, access, args
        )
        config = settled_config(args, len(train_dataset), given)
        check_data(
            train_dataset,
            eval_dataset,
            config,
            is_replay=not given.is_online,
            columns=given.columns,
        )
        policy = Policy.make(
            model,
            config,
            tokenizer=processing_class,
            ref_model=ref_model,
            peft_config=peft_config,
            base_name=base_name,
            is_offline=is_offline,
        )
        choose_learning_rate(config, policy.model, len(train_dataset), given)
        with unchanged_cache_option(policy.model):
            super().__init__(
                model=policy.model,
                args=config,
                data_collator=DataCollatorForDAR(),
                callbacks=callbacks,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=policy.tokenizer,
            )
        policy.place_reference(config.device)
        limit_search_for_unused(self)
        name_start_errors(self.callback_handler.callbacks)
        self._policy = policy
        self.stopped_by: StopKind | None = None
        """The request that ended `train` early."""
        self.ranks = ranks = Ranks.of_launch(config.process_index, config.world_size)
        self.sink = (sink or LogSink()) if ranks.is_main else NullSink()
        control = (control if ranks.is_main else None) or NullControl()
        self._run = RunContext(self, ranks, self.sink, control, job_id)
        self._assemble(
            given.load(ranks, config.device, is_offline=is_offline),
            compute_metrics,
            base_name or (model if isinstance(model, str) else model.name_or_path),
        )

    def _assemble(
        self, rewards: LoadedRewards, compute_metrics: ComputeMetrics | None, base_name: str | None
    ) -> None:
        """Create the parts of the trainer."""
        run, policy = self._run, self._policy
        self.reporter = reporter = Reporter(self.args)
        terms = rewards.terms()
        self._passes = ForwardPasses(run, policy)
        self._loop = StepLoop(run, policy.vocabulary, reporter)
        self._rewards = RewardSession(run, rewards, reporter)
        self._evaluation = RunEvaluation(
            run,
            source_of=lambda rows: self._source_of(rows, "eval"),
            opened=self._rewards.opened,
            measure=self._passes.policy_logps_and_entropies,
            compute_metrics=compute_metrics,
            is_replay=not rewards.given.is_online,
            columns=rewards.given.columns,
        )
        self.calibration = Calibration(
            run,
            opened=self._rewards.opened,
            note=reporter.note,
            source_of=lambda rows, config: self._source_of(rows, "calibrate", config=config),
            is_replay=not rewards.given.is_online,
        )
        self.hub = HubPush(
            run,
            base_name=base_name,
            is_resized=policy.is_resized,
            reward_names=[str(term["name"]) for term in terms],
            last_report=lambda: reporter.reported,
        )
        self._checkpoints = RunCheckpoints(
            run,
            self.hub,
            decisive=decisive_facts(
                self.args, policy.model, self.train_dataset, policy.base_sketch, terms
            ),
            parts=part_digests(policy.model, policy.tokenizer),
            is_resized=policy.is_resized,
            members=(self._loop, self._evaluation, self._rewards, self.calibration),
            last_report=lambda: reporter.reported,
            has_new_ends=policy.has_new_ends,
        )
        tag_model(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate; see `settle_accelerator`."""
        self.args.deepspeed_plugin = copy.deepcopy(self.args.deepspeed_plugin)  # it is changed here
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = settle_accelerator(self)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self._checkpoints.root

    @property
    def published_step(self) -> int:
        """Step of the newest checkpoint that was written or resumed from."""
        return self._checkpoints.published_step

    # --- training ------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,  # noqa: ANN401 - the signature of transformers
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to the last step, or until a stop is requested (see `stopped_by`).

        Args:
            resume_from_checkpoint: A checkpoint folder of a trainer with the same arguments;
                ``max_steps`` may be larger. True: the newest in ``args.output_dir``.
            trial: Not used.
            ignore_keys_for_eval: Must be empty: see `evaluate`.

        Returns:
            Steps done, and transformers' own metrics of the run.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to other arguments.
            InvalidRequestError: An argument cannot be used, or the processes have different ones.
            RewardError: No completion of a step could be scored.
            TrainingError: The loss or the policy is not finite, three steps in a row had no usable
                reward, or no step changed the model.
        """
        self.stopped_by = None
        try:
            with self.ranks.together(), self._checkpoints.finishing():
                start = functools.partial(
                    super().train, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
                )
                return self._train_together(resume_from_checkpoint, start)
        except StopRequestedError:
            # The unfinished step is dropped; nothing has changed since the one before.
            self.stopped_by = self.ranks.from_main(self._run.control.requested)
            if self.stopped_by == "drain":
                self._save_unpublished()
            return TrainOutput(self.state.global_step, math.nan, {})
        except RewardError:
            # As after a drain: the job may continue from here when there are rewards again.
            self._save_unpublished()
            raise
        finally:
            self.is_in_train = False

    def _train_together(
        self, resume: str | Path | bool | None, start: Callable[[str | None], TrainOutput]
    ) -> TrainOutput:
        check_trainable(self.model)
        if len(set(self.ranks.gather(self._checkpoints.config_sha256))) > 1:
            raise InvalidRequestError(
                "the processes of this training run have different arguments, data or base models; "
                "give all the same"
            )
        if not resume:
            is_online = self._rewards.loaded.given.is_online
            report_plan(self.args, len(self.train_dataset), self.sink, is_replay=not is_online)
        with self._rewards.opened():
            scoring = self._rewards.scoring(is_training=True)
            self._loop.begin(self._source_of(self.train_dataset, "train", scoring), scoring)
            self.calibration.begin()
            with self._evaluation.prepared():
                return self._train_from(resume, start)

    def _train_from(
        self, resume: str | Path | bool | None, start: Callable[[str | None], TrainOutput]
    ) -> TrainOutput:
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            raise InvalidRequestError(
                "DeepSpeed has wrapped this trainer's model, and can wrap it only once; make "
                "another trainer"
            )
        self._checkpoints.sweep()
        if not resume:
            return start(None)
        folder = self._checkpoints.named(resume)
        manifest = self._checkpoints.open(folder)
        if manifest.step >= self.args.max_steps:
            # The last step was done before: only its checkpoint is published in this run too.
            self._checkpoints.load_weights(folder)
            self.state.global_step = manifest.step
            self._checkpoints.restore_members()
            self._evaluate_if_due()
            self._checkpoints.republish(folder, manifest)
            return TrainOutput(manifest.step, math.nan, {})
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not is_sharded(self.model)):
            self._checkpoints.load_weights(folder)
        return start(str(folder / RESUME_FOLDER))

    def _save_unpublished(self) -> None:
        if self.state.global_step > self.published_step:
            self._save_checkpoint(self.model, None)
        self._checkpoints.finish()

    def _source_of(
        self,
        rows: Rows,
        mode: Mode,
        scoring: Scoring | None = None,
        config: DARConfig | None = None,
    ) -> OnlineSource | ReplaySource:
        """The step source of a data set; ``scoring`` counts failures of training."""
        is_online = self._rewards.loaded.given.is_online
        return make_source(
            self._run,
            self._policy,
            self._passes,
            config or self.args,
            rows,
            scoring=(scoring or self._rewards.scoring()) if is_online else None,
            mode=mode,
        )

    def get_train_dataloader(self) -> Any:  # noqa: ANN401 - transformers only iterates over its DataLoader
        """Endless and empty: a step is sampled when it begins, never earlier."""
        return itertools.repeat(None)

    def get_batch_samples(
        self,
        epoch_iterator: Any,  # noqa: ANN401, ARG002 - the signature of transformers
        num_batches: int,
        device: torch.device,  # noqa: ARG002 - the signature of transformers
    ) -> tuple[list[Any], None]:
        """Begin a step: ``num_batches`` shares, which are scored while they are trained on."""
        self._evaluate_if_due()
        self.calibration.begin_step()
        return self._loop.begin_step(num_batches), None

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,  # noqa: ANN401 - a `StepShare`; transformers passes on what `get_batch_samples` returned
        num_items_in_batch: Tensor | int | None = None,  # noqa: ARG002 - the signature of transformers
    ) -> Tensor:
        """Make the backward passes of a share; see `StepLoop.train`."""
        share: StepShare = inputs
        return self._loop.train(model, share)

    def _clip_grad_norm(self, model: nn.Module) -> Any:  # noqa: ANN401 - as transformers
        return self._loop.clip(functools.partial(super()._clip_grad_norm, model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:  # noqa: ANN401 - as transformers
        measure = functools.partial(super()._get_grad_norm, model, grad_norm)
        return self._loop.checked(self._loop.clip(measure) if grad_norm is None else measure())

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ANN401, ARG002 - the signature of transformers
        """Not counted: the estimate of transformers ignores sampling."""
        return 0

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        *rest: Any,  # noqa: ANN401 - as transformers
        **more: Any,  # noqa: ANN401 - as transformers
    ) -> None:
        step = self._loop.step
        if step is None:
            self._evaluation.end_loop()
        else:
            learning_rate = float(more.get("learning_rate") or 0.0)
            self.stopped_by = self._loop.end_step(step, float(grad_norm or 0.0), learning_rate)
            self._evaluation.end_step(step)
            self.calibration.end_step(step)
            if self._checkpoints.is_due():
                self.control.should_save = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **more)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report to the sink and, with DAR's metrics, to the callbacks of transformers."""
        self._log(self._loop.report(logs), start_time)

    def _log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        del self.state.log_history[:-LOG_HISTORY]

    def preview(self, prompts: int = 2) -> ScoredStep:
        """Sample and score the first prompts of a run; nothing is trained or written.

        Args:
            prompts: How many; at least one for each process.

        Raises:
            RewardError: No completion could be scored.
            TrainingError: The model cannot be sampled from.
        """
        config = copy.copy(self.args)
        config.per_device_train_batch_size = math.ceil(prompts / self.ranks.count)
        config.gradient_accumulation_steps = 1
        with self.ranks.together(), self._rewards.opened():
            step = self._source_of(self.train_dataset, "train", config=config)(1)
            rows = step.valid_rows
            if rows:
                pairs = [step.pairs[row] for row in rows]
                step.policy_logps_B[rows] = self._passes.policy_logps(pairs)
        return step

    def memory(self) -> dict[str, int]:
        """Bytes that stay in the memory of the main process, by content; without activations."""
        rewards = sum(model.size_bytes for model in self._rewards.loaded.models)
        return held_bytes(self, self._policy, rewards)

    # --- evaluation ----------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,  # noqa: ANN401 - the signature of transformers
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = EVALUATION.removesuffix("_"),
    ) -> dict[str, float]:
        """Sample completions of every prompt of the evaluation data, score and measure them.

        Every evaluation draws the same random numbers, those of step 0: a prompt's depend only on
        the seed, its row and the completion's number. Rewards get ``mode="eval"``. Data sets that
        hold completions and rewards are used as they are.

        Args:
            eval_dataset: Rows, or several data sets by name, which then is part of the names of
                their metrics; default: those of the constructor.
            ignore_keys: Must be empty: a model's outputs are no metrics here.
            metric_key_prefix: Put before the name of every metric, with a ``_``.

        Returns:
            The metrics of a training step (``eval_dar/rewards_mean``, …) for the whole data set,
            and those of ``compute_metrics``, without values that are not finite. The sink gets the
            same, and so do ``on_log`` and ``on_evaluate`` of the callbacks.

        Raises:
            InvalidRequestError: There are no evaluation data, a row cannot be used, or
                ``ignore_keys`` is not empty.
            RewardError: No completion could be scored.
            StopRequestedError: A stop was requested meanwhile.
            TrainingError: A reward is missing with ``allow_missing`` off, or a probability is not
                finite.
        """
        if ignore_keys:
            raise InvalidRequestError("a model's outputs are no metrics here", param="ignore_keys")
        values = self._evaluation.evaluate(eval_dataset, metric_key_prefix)
        self.sink.metrics(self.state.global_step, values)
        self._log(values)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, values
        )
        return values

    def _evaluate(
        self,
        trial: Any,  # noqa: ANN401, ARG002 - as transformers
        ignore_keys_for_eval: list[str] | None,
        skip_scheduler: bool = False,
    ) -> dict[str, float]:
        # transformers sets ``skip_scheduler`` before the first step
        return self._evaluation.evaluate_step(
            lambda: self.evaluate(ignore_keys=ignore_keys_for_eval), is_start=skip_scheduler
        )

    def _evaluate_if_due(self) -> None:
        if self._evaluation.is_due:
            self._evaluate(None, None)

    def predict(self, *_: Any, **__: Any) -> NoReturn:  # noqa: ANN401 - any arguments of transformers
        """Not supported: there are no labels to predict.

        Raises:
            InvalidRequestError: Always.
        """
        raise InvalidRequestError(
            "predict needs labelled data, which DAR does not use; evaluate measures the policy on "
            "prompts"
        )

    # --- checkpoints ---------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401, ARG002 - as transformers
        self._checkpoints.save()

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As transformers does, but without empty parameter groups."""
        if self.optimizer is None:
            return self._checkpoints.without_empty_groups(super().create_optimizer(model))
        return self.optimizer

    def _prepare_for_training(
        self,
        max_steps: int,
        train_dataloader: Any,  # noqa: ANN401 - as transformers
        resume_from_checkpoint: str | None,
    ) -> Any:  # noqa: ANN401 - as transformers
        is_deepspeed = self.is_deepspeed_enabled  # transformers would load DeepSpeed's pickles
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]  # transformers is only partly typed
            max_steps, train_dataloader, None if is_deepspeed else resume_from_checkpoint
        )
        if is_deepspeed:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(
        self,
        resume_from_checkpoint: str,
        model: nn.Module | None = None,  # noqa: ARG002 - as transformers
    ) -> None:
        if not is_sharded(self.model):  # else it was done before the weights were sharded
            self._checkpoints.load_weights(Path(resume_from_checkpoint).parent)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._checkpoints.restore_training()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._checkpoints.restore_random()

    # --- saving and the hub --------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what `from_pretrained` reads, and a model card; with ``args.push_to_hub``, push it.

        Args:
            output_dir: Folder; default: that of the arguments.
            _internal_call: Whether transformers calls, which pushes by itself.

        Raises:
            TrainingError: The hub cannot be reached, or rejects the upload.
        """
        folder = Path(output_dir or str(self.args.output_dir)).expanduser()
        self._checkpoints.save_model(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub("Model save", revision=self.args.hub_revision)

    def create_model_card(  # type: ignore[override]  # transformers takes facts that nothing here could use
        self,
        model_name: str | None = None,
        dataset: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write ``README.md`` into the output folder.

        Args:
            model_name: Default: the last part of ``hub_model_id``, or of the output folder.
            dataset: Names of data sets on the hub.
            tags: Further tags.
            language: ISO 639 code, or several.
            license: SPDX identifier in small letters, like ``apache-2.0``.
        """
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.hub.write_card(folder, CardNotes(model_name, dataset, tags, language, license))

    def push_to_hub(  # type: ignore[override]  # the card's facts have names here
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,  # noqa: ANN401 - those of `create_model_card`
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Push what `save_model` saves to ``args.hub_model_id``, which is created if needed.

        Args:
            commit_message: Message of the commit.
            blocking: Whether to wait for the end of the upload.
            token: Token of the hub; default: ``args.hub_token``, or the one with which this
                machine is logged in.
            revision: Branch; default: ``args.hub_revision``, or the main one.
            private: Whether a new repository is private; default: ``args.hub_private_repo``.
            **card: Facts for the model card; see `create_model_card`.

        Returns:
            The commit, or its future without ``blocking``; None on other processes than the main
            one.

        Raises:
            TrainingError: The hub cannot be reached, or rejects the upload.
        """
        return self.hub.push(
            commit_message or "End of training",
            write_model=self._checkpoints.save_model,
            is_blocking=blocking,
            token=token,
            revision=revision,
            private=private,
            notes=CardNotes(**card) if card else None,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository unless it exists; see `push_to_hub` for the arguments.

        Raises:
            TrainingError: The hub cannot be reached, or rejects the request.
        """
        name, has_begun = repository_name(self.args, self.hub_model_id), hasattr(self, "hub")
        with hub_errors(name, has_begun=has_begun):  # transformers' constructor calls it, too
            super().init_hf_repo(token, private)

    def _finish_current_push(self) -> None:
        self.hub.finish()
