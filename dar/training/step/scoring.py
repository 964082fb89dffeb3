"""`ScoringTrainer`: what a step needs before its gradient: completions, their rewards, and log-probabilities under policy and reference."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, nn

from dar.rewards.scoring.scorer import RewardScorer
from dar.rewards.scoring.step_report import StepObserver
from dar.training.config.config import DARConfig
from dar.training.data.rows import Rows, TokenPair
from dar.training.evaluation import EvaluatingTrainer, measured
from dar.training.model.logprobs import all_logps
from dar.training.parallel import deepspeed
from dar.training.parallel.sharding import is_sharded, whole
from dar.training.reward_sources import LoadedRewards
from dar.training.step.offline import ReplaySource
from dar.training.step.online import OnlineSource, Scoring
from dar.training.step.records import Mode, ScoredStep, Weigher
from dar.training.step.sources import make_source


class ScoringTrainer(EvaluatingTrainer):
    """Has completions sampled and scored, and measures them."""

    # Set by `dar.DARTrainer`:
    _rewards: LoadedRewards
    _job_id: str | None

    _scorer: RewardScorer | None = None
    """Of the main process, while it trains or evaluates."""
    _rewards_memory: dict[str, Any] | None = None
    """What the last scorer knew when it was closed: a step that is given up is followed by a checkpoint of the one before."""

    @property
    def _is_replay(self) -> bool:
        return not self._rewards.given.is_online

    def _source_of(
        self, rows: Rows, mode: Mode, config: DARConfig | None = None
    ) -> OnlineSource | ReplaySource:
        weigher = Weigher(
            self.args,
            self._reference_logps if self.args.alpha > 0 else None,
            self._policy_logps,
            dtype=torch.promote_types(self._policy.model.dtype, torch.float32),
        )
        return make_source(
            self._policy,
            config or self.args,
            rows,
            weigher,
            scoring=self._how_to_score() if self._rewards.given.is_online else None,
            job_id=self._job_id,
            sink=self.sink,
            control=self._control,
            ranks=self.ranks,
            mode=mode,
        )

    def _how_to_score(self) -> Scoring:
        return Scoring(
            self._scorer,
            overlap=self.args.overlap,
            order=self.args.order,
            is_streamable=self._may_stream,
            policy=self._rewards.failure,
            budget=self._budget,
            capacity=self._capacity,
        )

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        """Keep open what gives rewards, on the main process; inside of another of these, nothing."""
        with contextlib.ExitStack() as stack:
            if self._scorer is None and self.ranks.is_main:
                observer = self._reporter.observer = StepObserver(
                    self.sink.event,
                    self._tell_waiting,
                    concurrency=self._rewards.concurrency(),
                )
                scorer = self._rewards.open(
                    job_id=self._job_id, on_wait=self._tell_waiting, observer=observer
                )
                if scorer is not None:
                    stack.callback(
                        lambda: self._reporter.report_requests(
                            self.sink, min(self.state.global_step + 1, max(1, self.args.max_steps))
                        )
                    )
                    self._scorer = stack.enter_context(scorer)
                    stack.callback(self._leave_scorer, scorer)
            yield

    def _leave_scorer(self, scorer: RewardScorer) -> None:
        self._rewards_memory = scorer.state(self.state.global_step)
        self._scorer = None

    def own_state(self) -> dict[str, Any]:
        """Beside the counters, what is known of rewards and their services; asked for on the main process."""
        scorer = self._scorer
        memory = self._rewards_memory if scorer is None else scorer.state(self.state.global_step)
        return super().own_state() | {"rewards": memory}

    def restore_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""
        super().restore_own_state(state)
        if self._scorer is not None and state.get("rewards") is not None:
            self._scorer.restore(state["rewards"])

    def _end_step(self, step: ScoredStep, grad_norm: float, learning_rate: float) -> None:
        if self._scorer is not None:
            self._scorer.end_step(step.number)
        super()._end_step(step, grad_norm, learning_rate)

    def _tell_waiting(self, message: str) -> None:
        self.sink.phase("waiting_for_reward", self.state.global_step + 1, message)

    def _measured(self, pairs: Sequence[TokenPair]) -> Tensor:
        with whole(self.model):
            own = measured(
                self.model,
                [pairs[i] for i in self.ranks.slice(len(pairs))],
                collate=self.data_collator,
                vocabulary=self._policy.vocabulary,
                half=self.args.half,
                before_each=self._look_out,
            )
        return torch.cat(self.ranks.gather(own), dim=1)

    def _logps(self, model: nn.Module, pairs: Sequence[TokenPair]) -> Tensor:
        """Each process goes through its share, and all get the whole."""
        with whole(model):
            own_logps = all_logps(
                model,
                [pairs[i] for i in self.ranks.slice(len(pairs))],
                collate=self.data_collator,
                vocabulary=self._policy.vocabulary,
                half=self.args.half,
                before_each=self._look_out,
            )
        return torch.cat(self.ranks.gather(own_logps))

    def _policy_logps(self, pairs: Sequence[TokenPair]) -> Tensor:
        return self._logps(self.model, pairs)

    def _reference_logps(self, pairs: Sequence[TokenPair]) -> Tensor:
        reference = self._policy.reference
        if reference is not None:
            if not is_sharded(reference):
                self._shard(reference)
            return self._logps(reference, pairs)
        assert isinstance(self.model, PeftModel)
        with self.model.disable_adapter():
            return self._logps(self.model, pairs)

    def _shard(self, reference: nn.Module) -> None:
        """Cut the reference into shards where the policy is."""
        if self.is_fsdp_enabled:
            fsdp2_prepare_model(self.accelerator, reference)
        elif deepspeed.is_cut(self.model):
            deepspeed.cut(reference)
