"""`OnlineSource`: completions of a step are sampled from the policy and scored.

`make_source` makes the step source of a data set, this one or `ReplaySource`.
"""

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from dar.errors import InvalidRequestError
from dar.protocol.model_configs import rope_change
from dar.protocol.spec import TrainingOrder
from dar.protocol.spec_checks import NOTHING_TO_COMPARE
from dar.rewards.base import RewardContext, RewardSample
from dar.rewards.scoring.scorer import RewardScorer, ScoringStoppedError, Ticket
from dar.training.config.config import DARConfig
from dar.training.data.codec import TextCodec
from dar.training.data.rows import Prompt, PromptEncoder, Rows, TokenPair, naming_row
from dar.training.model import loading
from dar.training.model.policy import Policy
from dar.training.parallel.sharding import whole
from dar.training.report.sink import StopRequestedError
from dar.training.run_context import RunContext
from dar.training.sampling.prompts import EvaluationStream, PromptStream
from dar.training.sampling.sampler import Completion, Sampler, check_tokens
from dar.training.step.offline import ReplaySource, RowEncoder, check_replay
from dar.training.step.passes import ForwardPasses
from dar.training.step.records import PHASES, Mode, ScoredStep, Weigher
from dar.training.step.reward_feed import (
    PENDING,
    RewardCollector,
    RewardFeed,
    Scoring,
    StepInProgress,
)

STREAMS: Mapping[Mode, type[PromptStream]] = {
    "train": PromptStream,
    "eval": EvaluationStream,
    "calibrate": EvaluationStream,
}


@dataclass(frozen=True, slots=True)
class OnlineSource:
    """Samples from the policy and has the completions scored.

    Each process samples for its share of the prompts, and the main one has all completions scored,
    however long that takes. Its own completions are submitted prompt by prompt, as soon as the K
    completions of one have ended. Those of the other processes are submitted when all are sampled.
    """

    run: RunContext
    policy: Policy
    prompts: PromptStream
    sampler: Sampler
    scoring: Scoring
    weigher: Weigher
    mode: Mode
    """In an evaluation, a step's number is that of the steps done before, and its noise is always
    that of step 0."""

    def __call__(self, number: int) -> ScoredStep:
        """Sample, score and weigh step ``number``; see `StepSource`.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: A probability of the policy is not finite.
        """
        return self.begin(number).finished()

    def begin(
        self, number: int, *, staleness: int = 0, stored: Sequence[Completion] | None = None
    ) -> StepInProgress:
        """Sample step ``number`` and submit its completions.

        Args:
            number: From 1.
            staleness: Optimizer steps between the sampling policy and the trained one.
            stored: Its completions, if they were sampled before.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            TrainingError: A probability of the policy is not finite.
        """
        run = self.run
        run.phase(PHASES[self.mode])
        started = time.monotonic()
        prompts = self.prompts.of_step(number)
        mode: Literal["train", "eval"] = "train" if self.mode == "train" else "eval"
        context = RewardContext(number, mode, run.job_id, staleness)
        groups = _Groups(self.scoring.scorer, prompts, context, self.sampler.codec, run.should_stop)
        waited = 0.0
        if stored is None:
            own = run.ranks.slice(len(prompts))
            stored, waited = self._sample(groups, list(own), is_again=False)
        completions = list(stored)
        groups.submit_all(range(len(prompts)), completions)
        step = ScoredStep(
            number=number,
            epoch=self.prompts.epoch(number),
            prompts=prompts,
            pairs=groups.pairs(range(len(prompts)), completions),
            texts=[groups.text(one) for one in completions],
            finish_reasons=[completion.finish_reason for completion in completions],
            rewards=[PENDING] * len(completions),
            behavior_logps_B=_logps(completions),
            seconds={"sampling": time.monotonic() - started},
            idle_generation_seconds=waited,
            staleness=staleness,
        )
        self.weigher.begin(step)
        feed = self._feed(step, groups)
        if self.scoring.overlap == "none":
            feed.receive_all()
        self._measure_reference(step, range(len(completions)))
        return StepInProgress(step, feed, completions)

    def _feed(self, step: ScoredStep, groups: "_Groups") -> RewardFeed:
        scoring = self.scoring
        count = len(step.prompts)
        refill = 0
        if self.mode == "train" and scoring.policy is not None:
            refill = int((scoring.policy.refill - 1) * count + 1e-9)
        return RewardFeed(
            step,
            self.weigher,
            self.run.ranks,
            scoring=scoring,
            collector=self._collector(
                groups, self._evenly(count), scoring.part_order, may_all_fail=False
            ),
            resample=lambda again: self._resample(step, groups, again),
            most_refilled=refill,
            on_wait=self._report_wait,
        )

    def _report_wait(self, is_waiting: bool) -> None:
        if is_waiting:
            self.run.phase("waiting_for_reward")
        else:
            self.run.phase("training" if self.mode == "train" else PHASES[self.mode])

    def _evenly(self, count: int) -> list[int]:
        """Prompts in the order of training: at any time equal shares of all processes."""
        ranks = self.run.ranks
        owned = [ranks.slice_of(index, count) for index in range(ranks.count)]
        places = [((i + 1) / len(one), p) for one in owned for i, p in enumerate(one)]
        return [p for _, p in sorted(places)]

    def _collector(
        self, groups: "_Groups", numbers: Sequence[int], order: TrainingOrder, *, may_all_fail: bool
    ) -> RewardCollector | None:
        if self.scoring.scorer is None:
            return None
        return RewardCollector(
            self.scoring,
            {groups.place(number): groups.tickets[number] for number in numbers},
            order,
            is_training=self.mode == "train",
            may_all_fail=may_all_fail,
            should_stop=self.run.should_stop,
        )

    def _sample(
        self, groups: "_Groups", own: Sequence[int], *, is_again: bool
    ) -> tuple[list[Completion], float]:
        """Sample for this process's prompts.

        Returns:
            Completions of all processes, and the seconds in which this one waited for the others.
        """
        prompts, ranks = groups.prompts, self.run.ranks
        with whole(self.policy.model):
            completions = self.sampler.sample(
                self.policy.model,
                [prompts[p].ids for p in own],
                step=groups.context.step if self.mode == "train" else 0,
                numbers=[p + is_again * len(prompts) for p in own],
                before_each=self.run.poll,
                on_group=groups.submit if self.scoring.overlap != "none" else _wait_for_all,
            )
        sampled = time.monotonic()
        shares = ranks.gather([asdict(completion) for completion in completions])
        waited = time.monotonic() - sampled if ranks.count > 1 else 0.0
        return [Completion(**values) for values in itertools.chain(*shares)], waited

    def _resample(
        self, step: ScoredStep, groups: "_Groups", again: Sequence[int]
    ) -> RewardCollector | None:
        """Sample these prompts again with other noise, and replace their completions."""
        self.run.phase("sampling")
        started = time.monotonic()
        share = self.run.ranks.slice(len(step.prompts))
        own = [p for p in again if p in share]
        completions, waited = self._sample(groups, own, is_again=True)
        numbers = [p + len(step.prompts) for p in again]
        groups.submit_all(numbers, completions)
        rows = step.rows_of(again)
        pairs = groups.pairs(numbers, completions)
        for row, pair, completion in zip(rows, pairs, completions, strict=True):
            step.pairs[row] = pair
            step.texts[row] = groups.text(completion)
            step.finish_reasons[row] = completion.finish_reason
        step.behavior_logps_B[rows] = _logps(completions).to(step.behavior_logps_B.dtype)
        step.idle_generation_seconds += waited
        spent = time.monotonic() - started
        # A step that was sampled ahead has no time of its own before this.
        step.seconds["sampling"] = step.seconds.get("sampling", 0.0) + spent
        self._measure_reference(step, rows)
        return self._collector(groups, numbers, "fixed", may_all_fail=True)

    def _measure_reference(self, step: ScoredStep, rows: Sequence[int]) -> None:
        started = time.monotonic()
        self.weigher.measure_reference(step, rows)
        spent = time.monotonic() - started
        step.seconds["reference"] = step.seconds.get("reference", 0.0) + spent


@dataclass(frozen=True, slots=True)
class _Groups:
    """Submits the completions of a step for scoring, each prompt's once, on the main process.

    A prompt that is sampled again gets another number: its place in the step plus the number of
    prompts.
    """

    scorer: RewardScorer | None
    """None on the other processes."""
    prompts: Sequence[Prompt]
    context: RewardContext
    codec: TextCodec
    should_stop: Callable[[], bool]
    """Polled while the scorer accepts no more."""
    tickets: dict[int, Ticket] = field(init=False, default_factory=dict)

    def place(self, number: int) -> int:
        """Place of a prompt in the step."""
        return number % len(self.prompts)

    def text(self, completion: Completion) -> str:
        """What follows the prompt, without special tokens."""
        return self.codec.text(completion.ids)

    def pairs(self, numbers: Sequence[int], completions: Sequence[Completion]) -> list[TokenPair]:
        """Prompts with their completions, those of a prompt together."""
        k = len(completions) // len(numbers)
        return [
            TokenPair(self.prompts[self.place(numbers[i // k])].ids, completion.ids)
            for i, completion in enumerate(completions)
        ]

    def submit(self, number: int, completions: Sequence[Completion]) -> None:
        """Submit the completions of one prompt, unless it was done before.

        Raises:
            StopRequestedError: A stop was requested while the scorer accepted no more.
        """
        if self.scorer is None or number in self.tickets:
            return
        prompt, k = self.prompts[self.place(number)], len(completions)
        samples = [
            RewardSample(
                id=f"s{number * k + i}",
                group_id=f"g{number}",
                index=i,
                prompt=None if prompt.messages else prompt.text,
                messages=prompt.messages,
                completion=self.text(completion),
                finish_reason=completion.finish_reason,
                completion_tokens=len(completion.ids),
                completion_ids=completion.ids,
                columns=prompt.columns,
                prompt_text=prompt.text,
            )
            for i, completion in enumerate(completions)
        ]
        try:
            self.tickets[number] = self.scorer.submit(
                samples, self.context, should_stop=self.should_stop
            )
        except ScoringStoppedError:
            raise StopRequestedError from None

    def submit_all(self, numbers: Sequence[int], completions: Sequence[Completion]) -> None:
        """Submit the completions of these prompts, except those that were submitted before."""
        k = len(completions) // len(numbers)
        for i, number in enumerate(numbers):
            self.submit(number, completions[i * k : (i + 1) * k])


def _wait_for_all(number: int, completions: Sequence[Completion]) -> None:
    """With ``overlap="none"``, no prompt is submitted before all are sampled."""


def _logps(completions: Sequence[Completion]) -> torch.Tensor:
    return torch.tensor([completion.logp for completion in completions], dtype=torch.float64)


# --- the source of a data set ------------------------------------------------------------------


def make_source(
    run: RunContext,
    policy: Policy,
    passes: ForwardPasses,
    config: DARConfig,
    rows: Rows,
    *,
    scoring: Scoring | None,
    mode: Mode,
) -> OnlineSource | ReplaySource:
    """The step source of a data set.

    Args:
        run: The training run.
        policy: The model that is trained.
        passes: Measures completions.
        config: Of the run.
        rows: The data set.
        scoring: How completions are scored; None: ``rows`` hold completions and rewards.
        mode: In an evaluation or calibration, every step is all rows in their order.

    Raises:
        InvalidRequestError: A row cannot be used, or a prompt and ``max_new_tokens`` do not fit
            into the model's context.
        TrainingError: The model cannot be sampled from.
    """
    tokenizer = policy.tokenizer
    weigher = Weigher(
        config,
        passes.reference_logps if config.alpha > 0 else None,
        passes.policy_logps,
        dtype=torch.promote_types(policy.model.dtype, torch.float32),
    )
    longest = min(config.max_length or policy.longest, policy.longest)
    if mode == "train":
        _report_rope(run, policy, config)
    if scoring is None:
        row_encoder = _row_encoder(policy, config, longest)
        plan = config.step_plan(len(rows), is_replay=True)
        count = plan.per_step if mode == "train" else len(rows)
        check_replay(rows, row_encoder, count, mode)
        stream = _stream(run, mode, rows, row_encoder, config)
        _check_tokens(rows, row_encoder, policy)
        return ReplaySource(run, stream, weigher, tokenizer=tokenizer, mode=mode)
    plan = config.step_plan(len(rows), is_replay=False)
    if mode == "train" and config.dar_k == 1 and plan.per_step == 1:
        raise InvalidRequestError(f"{NOTHING_TO_COMPARE}; set dar_k to at least 2", param="dar_k")
    encoder = PromptEncoder(
        tokenizer, _longest_prompt(config, longest, policy), config.template_variables
    )
    stream = _stream(run, mode, rows, encoder, config)
    _check_tokens(rows, encoder, policy)
    sampler = _sampler(policy, config, longest)
    return OnlineSource(run, policy, stream, sampler, scoring, weigher, mode=mode)


def _stream(
    run: RunContext, mode: Mode, rows: Rows, encoder: PromptEncoder, config: DARConfig
) -> PromptStream:
    is_replay = isinstance(encoder, RowEncoder)
    stream = STREAMS[mode](rows, encoder, config, run.sink, is_replay=is_replay)
    run.ranks.from_main(stream.try_rows)
    return stream


def _row_encoder(policy: Policy, config: DARConfig, longest: int) -> RowEncoder:
    return RowEncoder(
        policy.tokenizer,
        config.max_prompt_length,
        longest=longest,
        vocabulary=policy.readable,
        eos_ids=loading.eos_ids(policy.model, policy.tokenizer),
        variables=config.template_variables,
    )


def _report_rope(run: RunContext, policy: Policy, config: DARConfig) -> None:
    """Say that sequences have fewer tokens than was asked for, if RoPE is the reason."""
    longest = policy.longest
    if longest == policy.steady_length and longest < (config.max_length or sys.maxsize):
        run.sink.event(
            "warn",
            f"a prompt with its completion has at most {longest} tokens, and a longer one is cut: "
            f"{rope_change(longest)}",
            {"kind": "rope_change", "longest": longest},
        )


def _longest_prompt(config: DARConfig, longest: int, policy: Policy) -> int:
    length = config.max_prompt_length or longest
    if length >= longest:  # the bound has no effect
        length = longest - config.max_new_tokens
    if length <= 0:
        why = "which is the most that max_length or the model allows"
        if longest == policy.steady_length:
            why = f"and {rope_change(longest)}"
        raise InvalidRequestError(
            f"a prompt and {config.max_new_tokens} new tokens do not fit into {longest} tokens, "
            f"{why}; lower max_new_tokens",
            param="max_new_tokens",
        )
    return length


def _sampler(policy: Policy, config: DARConfig, longest: int) -> Sampler:
    eos_ids = loading.eos_ids(policy.model, policy.tokenizer)
    sampler = Sampler(config, policy.tokenizer, eos_ids=eos_ids, max_length=longest)
    sampler.check(policy.model)
    return sampler


def _check_tokens(rows: Rows, encoder: PromptEncoder, policy: Policy) -> None:
    """Check every row if tokenizer or configs name a token beyond the model, maybe for padding."""
    limit, ends = policy.readable, loading.eos_ids(policy.model, policy.tokenizer)
    if max([*policy.tokenizer.get_vocab().values(), *ends], default=0) < limit:
        return
    for index in range(len(rows)):
        with naming_row(index):
            prompt = encoder(rows[index])
            before = [one.prompt_ids for one in prompt.completions if one.prompt_ids]
            check_tokens([prompt.ids, *before], limit)
            check_tokens([one.ids for one in prompt.completions], limit, "a completion")
