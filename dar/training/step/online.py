"""`OnlineSource`: completions of a step are sampled from the policy and scored."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedTokenizerBase

from dar.protocol.reward_spec import FailurePolicy, FallbackValue
from dar.protocol.spec import Order, Overlap
from dar.rewards.base import RewardContext, RewardSample
from dar.rewards.scoring.failures import FailureBudget
from dar.rewards.scoring.scorer import RewardScorer, ScoringStoppedError, Ticket
from dar.training.data.rows import Prompt, TokenPair
from dar.training.model.loading import LanguageModel
from dar.training.parallel.ranks import Ranks
from dar.training.parallel.sharding import whole
from dar.training.report.capacity import Capacity
from dar.training.report.sink import Control, Sink, StopRequestedError, check
from dar.training.sampling.prompts import PromptStream
from dar.training.sampling.sampler import Completion, Sampler
from dar.training.step.parts import StepInProgress
from dar.training.step.records import Mode, ScoredStep, Weigher
from dar.training.step.reward_feed import PENDING, Delivery, RewardFeed


@dataclass(frozen=True, slots=True)
class Scoring:
    """How the completions of a run are scored."""

    scorer: RewardScorer | None
    """None where this is not the main process."""
    overlap: Overlap = "none"
    order: Order = "fixed"
    is_streamable: bool = False
    """Whether a prompt can be weighed by itself."""
    policy: FailurePolicy | None = None
    """What becomes of groups that cannot be scored."""
    budget: FailureBudget | None = None
    """Counts them."""
    capacity: Capacity | None = None
    """Watches how fast they come."""


class OnlineSource:
    """Samples from the policy and has the completions scored.

    Each process samples for its share of the prompts; the main one has all completions scored, however long that takes. What it
    samples itself goes to the reward sources prompt by prompt, as soon as the K completions of one have ended; what the others
    sample goes there when they are done.

    Args:
        model: The policy.
        prompts: The prompts of each step.
        sampler: Samples K completions of each.
        scoring: Gives rewards.
        weigher: Turns them into weights.
        tokenizer: Makes text of completions.
        sink: Is told the phases.
        control: Is asked whether to go on.
        job_id: Named to reward services.
        mode: In an evaluation the number of a step is that of the steps done before, and the noise always that of step 0.
        ranks: The processes that sample together.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: PromptStream,
        sampler: Sampler,
        scoring: Scoring,
        weigher: Weigher,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sink: Sink,
        control: Control,
        job_id: str | None,
        ranks: Ranks,
        mode: Mode = "train",
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._sampler = sampler
        self._scoring = scoring
        self._weigher = weigher
        self._tokenizer = tokenizer
        self._sink = sink
        self._control = control
        self._job_id = job_id
        self._ranks = ranks
        self._mode: Mode = mode

    def __call__(self, number: int) -> ScoredStep:
        """Sample and score step ``number``, whole; see `StepSource`.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: The policy gave a probability that is no number.
        """
        return self.begin(number).finished()

    def begin(
        self, number: int, *, staleness: int = 0, stored: Sequence[Completion] | None = None
    ) -> StepInProgress:
        """Sample step ``number`` and ask for its rewards.

        Args:
            number: From 1.
            staleness: Optimizer steps that will lie between the policy as it is and the training.
            stored: Its completions, where they were sampled before.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            TrainingError: The policy gave a probability that is no number.
        """
        self._sink.phase("sampling" if self._mode == "train" else "evaluating", number)
        started = time.monotonic()
        prompts = self._prompts.of_step(number)
        asking = self._asking(number, prompts, staleness)
        waited = 0.0
        if stored is None:
            own = self._ranks.slice(len(prompts))
            stored, waited = self._sample(asking, list(own), is_again=False)
        completions = list(stored)
        asking.ask_rest(range(len(prompts)), completions)
        step = ScoredStep(
            number=number,
            epoch=self._prompts.epoch(number),
            prompts=prompts,
            pairs=asking.pairs(range(len(prompts)), completions),
            texts=[asking.text(one) for one in completions],
            finish_reasons=[completion.finish_reason for completion in completions],
            rewards=[PENDING] * len(completions),
            behavior_logps_B=_logps(completions),
            seconds={"sampling": time.monotonic() - started},
            idle_generation_seconds=waited,
            staleness=staleness,
        )
        self._weigher.begin(step)
        feed = self._feed(step, asking)
        if self._scoring.overlap == "none":
            feed.receive_all()
        self._ask_reference(step, range(len(completions)))
        return StepInProgress(step, feed, completions)

    def _feed(self, step: ScoredStep, asking: "_Asking") -> RewardFeed:
        scoring = self._scoring
        order: Order = "fixed" if scoring.overlap == "none" else scoring.order
        count = len(step.prompts)
        refill = 0
        if self._mode == "train" and scoring.policy is not None:
            refill = int((scoring.policy.refill - 1) * count + 1e-9)
        return RewardFeed(
            step,
            self._weigher,
            self._ranks,
            delivery=self._delivery(asking, self._evenly(count), order, may_all_fail=False),
            resample=lambda again: self._resample(step, asking, again),
            order=order,
            is_streamed=scoring.overlap != "none",
            is_streamable=scoring.is_streamable,
            refill=refill,
            on_wait=lambda is_waiting: self._tell(step.number, is_waiting=is_waiting),
        )

    def _tell(self, number: int, *, is_waiting: bool) -> None:
        if self._mode == "train":
            self._sink.phase("waiting_for_reward" if is_waiting else "training", number)

    def _evenly(self, count: int) -> list[int]:
        """Prompts in the order in which they are trained on: of every process the same share at any time."""
        owned = [self._ranks.slice_of(index, count) for index in range(self._ranks.count)]
        places = [((i + 1) / len(one), p) for one in owned for i, p in enumerate(one)]
        return [p for _, p in sorted(places)]

    def _delivery(
        self, asking: "_Asking", numbers: Sequence[int], order: Order, *, may_all_fail: bool
    ) -> Delivery | None:
        scoring = self._scoring
        if scoring.scorer is None:
            return None
        tickets = {asking.place(number): asking.tickets[number] for number in numbers}
        scoring.scorer.complete(list(tickets.values()))
        has_fallback = scoring.policy is not None and isinstance(
            scoring.policy.on_error, FallbackValue
        )
        return Delivery(
            scoring.scorer,
            tickets,
            order,
            policy=scoring.policy,
            budget=scoring.budget if self._mode == "train" else None,
            may_all_fail=may_all_fail or has_fallback,
            should_stop=self._should_stop,
            on_end=lambda: self._end_rewards(list(tickets.values())),
        )

    def _end_rewards(self, tickets: Sequence[Ticket]) -> None:
        if self._scoring.capacity is not None and self._mode == "train":
            self._scoring.capacity.end_rewards(tickets)

    def _asking(self, number: int, prompts: Sequence[Prompt], staleness: int) -> "_Asking":
        context = RewardContext(number, self._mode, self._job_id, staleness)
        return _Asking(self._scoring.scorer, prompts, context, self._tokenizer, self._should_stop)

    def _sample(
        self, asking: "_Asking", own: Sequence[int], *, is_again: bool
    ) -> tuple[list[Completion], float]:
        """Completions of this process's prompts; those of all processes, and seconds of waiting for the others."""
        prompts = asking.prompts
        with whole(self._model):
            completions = self._sampler.sample(
                self._model,
                [prompts[p].ids for p in own],
                step=asking.context.step if self._mode == "train" else 0,
                numbers=[p + is_again * len(prompts) for p in own],
                before_each=self._look_out,
                on_group=asking.ask if self._scoring.overlap != "none" else _later,
            )
        sampled = time.monotonic()
        shares = self._ranks.gather([asdict(completion) for completion in completions])
        waited = time.monotonic() - sampled if self._ranks.count > 1 else 0.0
        return [Completion(**values) for values in itertools.chain(*shares)], waited

    def _resample(
        self, step: ScoredStep, asking: "_Asking", again: Sequence[int]
    ) -> Delivery | None:
        """Sample these prompts once more, with other noise, and put what comes in the place of what was there."""
        self._sink.phase("sampling", step.number)
        started = time.monotonic()
        share = self._ranks.slice(len(step.prompts))
        own = [p for p in again if p in share]
        completions, waited = self._sample(asking, own, is_again=True)
        numbers = [p + len(step.prompts) for p in again]
        asking.ask_rest(numbers, completions)
        rows = step.rows_of(again)
        pairs = asking.pairs(numbers, completions)
        for row, pair, completion in zip(rows, pairs, completions, strict=True):
            step.pairs[row] = pair
            step.texts[row] = asking.text(completion)
            step.finish_reasons[row] = completion.finish_reason
        step.behavior_logps_B[rows] = _logps(completions).to(step.behavior_logps_B.dtype)
        step.idle_generation_seconds += waited
        spent = time.monotonic() - started
        # A step that was sampled ahead counts no time of its own before this.
        step.seconds["sampling"] = step.seconds.get("sampling", 0.0) + spent
        self._ask_reference(step, rows)
        return self._delivery(asking, numbers, "fixed", may_all_fail=True)

    def _ask_reference(self, step: ScoredStep, rows: Sequence[int]) -> None:
        started = time.monotonic()
        self._weigher.ask_reference(step, rows)
        spent = time.monotonic() - started
        step.seconds["reference"] = step.seconds.get("reference", 0.0) + spent

    def _look_out(self) -> None:
        check(self._control)
        self._ranks.look()

    def _should_stop(self) -> bool:
        """Asked by the main process while it waits for rewards; what another one has failed with is raised from here."""
        self._ranks.look()
        return self._control.requested() is not None


class _Asking:
    """Hands the completions of a step to the reward sources, each prompt's once; other processes than the main one only keep texts.

    A prompt that is sampled once more has another number then: its place in the step and the number of prompts together.

    Args:
        scorer: Of the main process.
        prompts: Of the step.
        context: Of the step.
        tokenizer: Makes text of completions.
        should_stop: Asked where the scorer lets wait.
    """

    def __init__(
        self,
        scorer: RewardScorer | None,
        prompts: Sequence[Prompt],
        context: RewardContext,
        tokenizer: PreTrainedTokenizerBase,
        should_stop: Callable[[], bool],
    ) -> None:
        self.prompts = prompts
        self.context = context
        self.tickets: dict[int, Ticket] = {}
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._should_stop = should_stop

    def place(self, number: int) -> int:
        """Of a prompt in the step."""
        return number % len(self.prompts)

    def text(self, completion: Completion) -> str:
        """A completion without special tokens."""
        return str(self._tokenizer.decode(completion.ids, skip_special_tokens=True))

    def pairs(self, numbers: Sequence[int], completions: Sequence[Completion]) -> list[TokenPair]:
        """Prompts with their completions, those of a prompt together."""
        k = len(completions) // len(numbers)
        return [
            TokenPair(self.prompts[self.place(numbers[i // k])].ids, completion.ids)
            for i, completion in enumerate(completions)
        ]

    def ask(self, number: int, completions: Sequence[Completion]) -> None:
        """Have the completions of one prompt scored.

        Raises:
            StopRequestedError: A stop was requested while the scorer took no more.
        """
        if self._scorer is None or number in self.tickets:
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
            self.tickets[number] = self._scorer.submit(
                samples, self.context, should_stop=self._should_stop
            )
        except ScoringStoppedError:
            raise StopRequestedError from None

    def ask_rest(self, numbers: Sequence[int], completions: Sequence[Completion]) -> None:
        """Have all of these prompts scored that were not asked about before."""
        k = len(completions) // len(numbers)
        for i, number in enumerate(numbers):
            self.ask(number, completions[i * k : (i + 1) * k])


def _later(number: int, completions: Sequence[Completion]) -> None:
    """With ``overlap="none"`` nothing is asked before everything is sampled."""


def _logps(completions: Sequence[Completion]) -> torch.Tensor:
    return torch.tensor([completion.logp for completion in completions], dtype=torch.float64)
