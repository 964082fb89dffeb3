"""`RewardFeed`: brings the rewards of a sampled step to all processes, in the order in which it is trained on."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dar.protocol.reward_spec import FailurePolicy
from dar.protocol.spec import Order
from dar.rewards.base import SampleReward
from dar.rewards.scoring.failures import FailureBudget, under_policy
from dar.rewards.scoring.scorer import RewardScorer, ScoringStoppedError, Ticket
from dar.training.parallel.ranks import Ranks
from dar.training.report.sink import StopRequestedError
from dar.training.step.parts import Prompts, flat
from dar.training.step.records import LEAST_VALID, ScoredStep, Weigher

PENDING = SampleReward(None, "skip", None, {})
"""Stands where a reward has not come yet; nobody gets to see it."""


class Delivery:
    """The rewards of a step as the main process collects them, group by group.

    Args:
        scorer: Was given the tickets.
        tickets: Of each prompt, by its number in the step, in the order in which they are wanted.
        order: Whether they may come in another.
        policy: What becomes of groups with failures; None: they stay as they are.
        budget: Counts failures; None: nobody does.
        may_all_fail: Whether it is no error when nothing can be scored.
        should_stop: Asked while waiting.
        on_end: Is told when the last reward has come.
    """

    def __init__(
        self,
        scorer: RewardScorer,
        tickets: Mapping[int, Ticket],
        order: Order,
        *,
        policy: FailurePolicy | None,
        budget: FailureBudget | None,
        may_all_fail: bool,
        should_stop: Callable[[], bool],
        on_end: Callable[[], None],
    ) -> None:
        self._left = len(tickets)
        self._on_end = on_end
        self._prompts = {id(ticket): prompt for prompt, ticket in tickets.items()}
        self._coming = scorer.collect(
            list(tickets.values()), order, may_all_fail=may_all_fail, should_stop=should_stop
        )
        self._policy = policy
        self._budget = budget
        self._should_stop = should_stop
        self._here: dict[int, list[SampleReward]] = {}

    def take(self, is_enough: Callable[[Mapping[int, Any]], bool]) -> dict[int, list[SampleReward]]:
        """Wait until ``is_enough`` of the prompts that are here and not yet taken; all of these. `keep` puts some back.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: The failure policy ends the job.
        """
        try:
            while not is_enough(self._here):
                ticket, rewards = next(self._coming)
                if self._budget is not None:
                    self._budget.add_group(rewards, [sample.id for sample in ticket.samples])
                if self._policy is not None:
                    rewards = under_policy(self._policy, rewards)
                self._here[self._prompts[id(ticket)]] = rewards
                self._left -= 1
                if not self._left:
                    self._on_end()
        except ScoringStoppedError:
            raise StopRequestedError from None
        if self._should_stop():
            raise StopRequestedError
        taken, self._here = self._here, {}
        return taken

    def keep(self, rewards: Mapping[int, list[SampleReward]]) -> None:
        """Put back what is for later."""
        self._here.update(rewards)


class RewardFeed:
    """The rewards of one step; see `dar.training.step.parts.Feed`.

    Args:
        step: Completions and, from the start, reference log-probabilities.
        weigher: Makes weights of rewards.
        ranks: The processes that train together.
        delivery: Brings the rewards to the main process; None in the others.
        resample: Samples these prompts once more, puts the completions into the step, and has them scored.
        order: In which prompts are taken.
        is_streamed: Whether a part is given before the rewards of all are here.
        is_streamable: Whether a prompt can be weighed by itself.
        refill: Most prompts that are sampled again.
        on_wait: Told with True when there is nothing to do but wait, and with False when that is over.
    """

    def __init__(
        self,
        step: ScoredStep,
        weigher: Weigher,
        ranks: Ranks,
        *,
        delivery: Delivery | None,
        resample: Callable[[Sequence[int]], Delivery | None],
        order: Order,
        is_streamed: bool,
        is_streamable: bool,
        refill: int,
        on_wait: Callable[[bool], None],
    ) -> None:
        self._step = step
        self._weigher = weigher
        self._ranks = ranks
        self._delivery = delivery
        self._resample = resample
        self._order = order
        self._is_streamed = is_streamed and is_streamable
        self._is_streamable = is_streamable
        self._refill = refill
        self._on_wait = on_wait
        self._is_all_here = False
        self._has_finished = False
        self._has_refilled = False

    def take(self, part: Prompts) -> Prompts:
        """See `dar.training.step.parts.Feed`.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: A reward is missing and may not be.
        """
        if not self._is_streamable:
            self.finish()
            return part
        if self._is_streamed:
            part = self._receive(part, self._order)
        else:
            self.receive_all()
        prompts = sorted(flat(part))
        if prompts:
            self._weigher.weigh(self._step, prompts)
        return part

    def finish(self) -> None:
        """See `dar.training.step.parts.Feed`."""
        if self._has_finished:
            return
        self._has_finished = True
        self.receive_all()
        self._sample_again()
        self._weigher.weigh(self._step, range(len(self._step.prompts)))

    def refill(self) -> Prompts | None:
        """See `dar.training.step.parts.Feed`."""
        again = self._sample_again()
        if again is not None:
            self._weigher.weigh(self._step, sorted(flat(again)))
        return again

    def _own(self, prompts: Sequence[int]) -> Prompts:
        """The prompts of each process among these."""
        count = len(self._step.prompts)
        return [
            [p for p in prompts if p in self._ranks.slice_of(index, count)]
            for index in range(self._ranks.count)
        ]

    # --- waiting -------------------------------------------------------------------------------------------------------

    def receive_all(self) -> None:
        """Wait for all rewards.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: The failure policy ends the job.
        """
        if not self._is_all_here:
            self._receive(self._own(range(len(self._step.prompts))), "fixed")
            self._is_all_here = True

    def _receive(self, part: Prompts, order: Order) -> Prompts:
        """Wait for a part on the main process, and tell all what has come."""
        started = time.monotonic()
        self._on_wait(True)
        told = self._ranks.from_main(lambda: self._received(part, order))
        self._on_wait(False)
        for prompt, rewards in told["rewards"]:
            rows = self._step.rows_of([prompt])
            for row, values in zip(rows, rewards, strict=True):
                self._step.rewards[row] = SampleReward(**values)
        waited = time.monotonic() - started
        self._step.seconds["reward"] = self._step.seconds.get("reward", 0.0) + waited
        prompts: Prompts = told["prompts"]
        return prompts

    def _received(self, part: Prompts, order: Order) -> dict[str, Any]:
        def of_each(here: Mapping[int, Any]) -> Prompts:
            owned = part if order == "fixed" else self._own(list(here))
            return [[p for p in one if p in here] for one in owned]

        def is_enough(here: Mapping[int, Any]) -> bool:
            return all(len(a) >= len(b) for a, b in zip(of_each(here), part, strict=True))

        assert self._delivery is not None
        here = self._delivery.take(is_enough)
        prompts = [
            sorted(own[: len(wanted)]) for own, wanted in zip(of_each(here), part, strict=True)
        ]
        taken = set(flat(prompts))
        self._delivery.keep({p: rewards for p, rewards in here.items() if p not in taken})
        rewards = [(p, [asdict(one) for one in here[p]]) for p in sorted(taken)]
        return {"prompts": prompts, "rewards": rewards}

    # --- once more -----------------------------------------------------------------------------------------------------

    def _sample_again(self) -> Prompts | None:
        """Give prompts of which too few completions have a reward a second chance, once."""
        step = self._step
        if self._has_refilled:
            return None
        self._has_refilled = True
        least = min(LEAST_VALID, max(step.counts))
        dropped = [p for p in range(len(step.prompts)) if self._scored_count(p) < least]
        step.dropped_count = len(dropped)
        again = dropped[: self._refill]
        if not again:
            return None
        step.refilled_count = len(again)
        self._delivery = self._resample(again)
        return self._receive(self._own(again), "fixed")

    def _scored_count(self, prompt: int) -> int:
        rows = self._step.rows_of([prompt])
        return sum(self._step.rewards[row].reward is not None for row in rows)
