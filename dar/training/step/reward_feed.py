"""The rewards of a sampled step, and the parts in which it is trained on as they arrive.

A step is cut the same way whatever is overlapped, so that overlapping changes no bit of the result:
first into as many shares as transformers accumulates gradients over, then, where a prompt can be
weighed by itself, into parts of at least `LEAST_ROWS` completions and at most `MOST_PARTS` in all.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dar.protocol.reward_spec import FailurePolicy, FallbackValue
from dar.protocol.spec import Overlap, TrainingOrder
from dar.rewards.base import SampleReward
from dar.rewards.scoring.failures import FailureBudget, under_policy
from dar.rewards.scoring.scorer import RewardScorer, ScoringStoppedError, Ticket
from dar.training.parallel.ranks import Ranks
from dar.training.report.capacity import Capacity
from dar.training.report.sink import StopRequestedError
from dar.training.sampling.sampler import Completion
from dar.training.step.records import LEAST_VALID, ScoredStep, Weigher

PENDING = SampleReward(None, "skip", None, {})
"""Placeholder of a reward that has not arrived."""
LEAST_ROWS = 16
"""A part with fewer completions of a process is not cut: smaller passes leave a GPU idle."""
MOST_PARTS = 8
"""Parts of a step: when the last one is scored, an eighth of the training is left."""

Prompts = list[list[int]]
"""Numbers of prompts of a step, for each process."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How the completions of a run are scored."""

    scorer: RewardScorer | None = None
    """None on the other processes, and where the data hold the rewards."""
    overlap: Overlap = "none"
    order: TrainingOrder = "fixed"
    is_streamable: bool = False
    """Whether a prompt can be weighed by itself."""
    policy: FailurePolicy | None = None
    """What becomes of groups that cannot be scored."""
    budget: FailureBudget | None = None
    """Counts failures, on the main process while it trains."""
    capacity: Capacity | None = None
    """Measures how fast rewards arrive, on the main process while it trains."""

    @property
    def is_streamed(self) -> bool:
        """Whether a part of a step is trained on before the other rewards are known."""
        return self.overlap != "none" and self.is_streamable

    @property
    def part_order(self) -> TrainingOrder:
        """Order in which the prompts of a step are trained on."""
        return "fixed" if self.overlap == "none" else self.order


class RewardCollector:
    """Collects the rewards of a step on the main process, group by group.

    Args:
        scoring: How they are scored; with a scorer.
        tickets: Ticket of each prompt by its number in the step, in the order in which they are
            needed.
        order: Whether they may arrive in another order.
        is_training: Whether failures and times are counted.
        may_all_fail: Whether it is no error if nothing can be scored.
        should_stop: Polled while waiting.
    """

    def __init__(
        self,
        scoring: Scoring,
        tickets: Mapping[int, Ticket],
        order: TrainingOrder,
        *,
        is_training: bool,
        may_all_fail: bool,
        should_stop: Callable[[], bool],
    ) -> None:
        assert scoring.scorer is not None
        self._tickets = list(tickets.values())
        scoring.scorer.complete(self._tickets)
        has_fallback = scoring.policy is not None and isinstance(
            scoring.policy.on_error, FallbackValue
        )
        self._missing = len(tickets)
        self._prompts = {id(ticket): prompt for prompt, ticket in tickets.items()}
        self._arriving = scoring.scorer.collect(
            self._tickets, order, may_all_fail=may_all_fail or has_fallback, should_stop=should_stop
        )
        self._policy = scoring.policy
        self._budget = scoring.budget if is_training else None
        self._capacity = scoring.capacity if is_training else None
        self._should_stop = should_stop
        self._arrived: dict[int, list[SampleReward]] = {}

    def take(self, is_enough: Callable[[Mapping[int, Any]], bool]) -> dict[int, list[SampleReward]]:
        """Wait until the arrived prompts that were not taken before are enough; returns them all.

        `keep` puts some of them back.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: The failure policy ends the job.
        """
        try:
            while not is_enough(self._arrived):
                ticket, rewards = next(self._arriving)
                if self._budget is not None:
                    self._budget.add_group(rewards, [sample.id for sample in ticket.samples])
                if self._policy is not None:
                    rewards = under_policy(self._policy, rewards)
                self._arrived[self._prompts[id(ticket)]] = rewards
                self._missing -= 1
                if not self._missing and self._capacity is not None:
                    self._capacity.end_rewards(self._tickets)
        except ScoringStoppedError:
            raise StopRequestedError from None
        if self._should_stop():
            raise StopRequestedError
        taken, self._arrived = self._arrived, {}
        return taken

    def keep(self, rewards: Mapping[int, list[SampleReward]]) -> None:
        """Put rewards back for later."""
        self._arrived.update(rewards)


@dataclass(frozen=True, slots=True)
class StepPart:
    """Prompts whose completions are scored and weighed."""

    prompts: Prompts
    is_last: bool
    """Whether the optimizer steps after it."""


@dataclass(slots=True)
class RewardFeed:
    """The rewards of one step, on all processes; they call its methods together."""

    step: ScoredStep
    """Its completions; their reference log-probabilities are known before the rewards."""
    weigher: Weigher
    ranks: Ranks
    scoring: Scoring
    collector: RewardCollector | None
    """Collects the rewards on the main process; None on the others."""
    resample: Callable[[Sequence[int]], RewardCollector | None]
    """Samples these prompts again, puts the completions into the step, and submits them."""
    most_refilled: int
    """Most prompts that are sampled again."""
    on_wait: Callable[[bool], None]
    """Called with True when a wait begins, and with False when it ends."""
    _has_arrived: bool = field(init=False, default=False)
    _has_finished: bool = field(init=False, default=False)
    _has_refilled: bool = field(init=False, default=False)

    def take(self, part: Prompts) -> Prompts:
        """Wait for the rewards of a part: these prompts, or as many others that are scored first.

        Returns:
            Prompts that are weighed now, and were not returned before.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: A reward is missing, and ``allow_missing`` is off.
        """
        if not self.scoring.is_streamable:
            self.finish()
            return part
        if self.scoring.is_streamed:
            part = self._receive(part, self.scoring.part_order)
        else:
            self.receive_all()
        prompts = sorted(_flat(part))
        if prompts:
            self.weigher.weigh(self.step, prompts)
        return part

    def finish(self) -> None:
        """Wait for all rewards, and weigh all prompts at once."""
        if self._has_finished:
            return
        self._has_finished = True
        self.receive_all()
        self._sample_again()
        self.weigher.weigh(self.step, range(len(self.step.prompts)))

    def refill(self) -> Prompts | None:
        """Sample again, after all were taken, the prompts with too few rewards; returns them."""
        again = self._sample_again()
        if again is not None:
            self.weigher.weigh(self.step, sorted(_flat(again)))
        return again

    def _own(self, prompts: Sequence[int]) -> Prompts:
        """The prompts of each process among these."""
        count = len(self.step.prompts)
        return [
            [p for p in prompts if p in self.ranks.slice_of(index, count)]
            for index in range(self.ranks.count)
        ]

    # --- waiting -------------------------------------------------------------------------------

    def receive_all(self) -> None:
        """Wait for all rewards.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: The failure policy ends the job.
        """
        if not self._has_arrived:
            self._receive(self._own(range(len(self.step.prompts))), "fixed")
            self._has_arrived = True

    def _receive(self, part: Prompts, order: TrainingOrder) -> Prompts:
        """Wait for a part on the main process, and send its rewards to all processes."""
        started = time.monotonic()
        self.on_wait(True)
        received = self.ranks.from_main(lambda: self._received(part, order))
        self.on_wait(False)
        for prompt, rewards in received["rewards"]:
            rows = self.step.rows_of([prompt])
            for row, values in zip(rows, rewards, strict=True):
                self.step.rewards[row] = SampleReward(**values)
        waited = time.monotonic() - started
        self.step.seconds["reward"] = self.step.seconds.get("reward", 0.0) + waited
        prompts: Prompts = received["prompts"]
        return prompts

    def _received(self, part: Prompts, order: TrainingOrder) -> dict[str, Any]:
        def of_each(arrived: Mapping[int, Any]) -> Prompts:
            owned = part if order == "fixed" else self._own(list(arrived))
            return [[p for p in one if p in arrived] for one in owned]

        def is_enough(arrived: Mapping[int, Any]) -> bool:
            return all(len(a) >= len(b) for a, b in zip(of_each(arrived), part, strict=True))

        assert self.collector is not None
        arrived = self.collector.take(is_enough)
        prompts = [
            sorted(own[: len(needed)]) for own, needed in zip(of_each(arrived), part, strict=True)
        ]
        taken = set(_flat(prompts))
        self.collector.keep({p: rewards for p, rewards in arrived.items() if p not in taken})
        rewards = [(p, [asdict(one) for one in arrived[p]]) for p in sorted(taken)]
        return {"prompts": prompts, "rewards": rewards}

    # --- sampling again ------------------------------------------------------------------------

    def _sample_again(self) -> Prompts | None:
        """Sample prompts again of which too few completions have a reward; once in a step."""
        step = self.step
        if self._has_refilled:
            return None
        self._has_refilled = True
        least = min(LEAST_VALID, max(step.counts))
        dropped = [p for p in range(len(step.prompts)) if self._scored_count(p) < least]
        step.dropped_count = len(dropped)
        again = dropped[: self.most_refilled]
        if not again:
            return None
        step.refilled_count = len(again)
        self.collector = self.resample(again)
        return self._receive(self._own(again), "fixed")

    def _scored_count(self, prompt: int) -> int:
        rows = self.step.rows_of([prompt])
        return sum(self.step.rewards[row].reward is not None for row in rows)


class StepInProgress:
    """A step whose completions are known, and whose rewards may still arrive.

    Args:
        step: The step.
        feed: Its rewards as they arrive; None: they are known.
        sampled: Its completions if they were sampled.
    """

    def __init__(
        self, step: ScoredStep, feed: RewardFeed | None = None, sampled: Sequence[Completion] = ()
    ) -> None:
        self.step = step
        self.sampled = tuple(sampled)
        self._feed = feed

    def finished(self) -> ScoredStep:
        """The step with all rewards and weights; waits for them."""
        if self._feed is not None:
            self._feed.finish()
        return self.step

    def shares(self, ranks: Ranks, count: int, *, is_streamable: bool) -> list[Iterator[StepPart]]:
        """The parts of each of ``count`` shares; the shares must be iterated over in order."""
        most = max(1, MOST_PARTS // count) if self._feed is not None and is_streamable else 1
        plan = [_cut(share, self.step, most) for share in _shares(self.step, ranks, count)]
        return [self._parts(parts, is_last=i == count - 1) for i, parts in enumerate(plan)]

    def _parts(self, plan: Sequence[Prompts], *, is_last: bool) -> Iterator[StepPart]:
        for i, part in enumerate(plan):
            prompts = part if self._feed is None else self._feed.take(part)
            is_end = is_last and i == len(plan) - 1
            again = self._feed.refill() if is_end and self._feed is not None else None
            if again is not None:  # they count now, and are trained on only once
                prompts = _without(prompts, again)
            yield StepPart(prompts, is_last=is_end and again is None)
            if again is not None:
                yield StepPart(again, is_last=True)


def _shares(step: ScoredStep, ranks: Ranks, count: int) -> list[Prompts]:
    """The prompts of each process, for each share."""
    own = [ranks.slice_of(index, len(step.prompts)) for index in range(ranks.count)]
    return [
        [list(one[len(one) * i // count : len(one) * (i + 1) // count]) for one in own]
        for i in range(count)
    ]


def _cut(share: Prompts, step: ScoredStep, most: int) -> list[Prompts]:
    """Cut a share into parts; each process has a piece of every part."""
    rows = max(sum(step.counts[p] for p in prompts) for prompts in share)
    count = max(1, min(most, rows // LEAST_ROWS, max(map(len, share))))
    cuts = [[len(one) * i // count for i in range(count + 1)] for one in share]
    return [
        [one[a[i] : a[i + 1]] for one, a in zip(share, cuts, strict=True)] for i in range(count)
    ]


def _without(prompts: Prompts, others: Prompts) -> Prompts:
    left_out = set(_flat(others))
    return [[p for p in one if p not in left_out] for one in prompts]


def _flat(prompts: Prompts) -> list[int]:
    """The prompts of all processes."""
    return list(itertools.chain(*prompts))
