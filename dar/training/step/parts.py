"""The parts of a step: which prompts are trained on together, once their rewards are there.

A step is cut the same way whatever is overlapped with what, so that overlapping changes no bit of the result: first into as many
shares as transformers accumulates gradients over, then, where a prompt can be weighed by itself, into parts of at least
`LEAST_ROWS` completions and at most `MOST_PARTS` in all.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dar.training.parallel.ranks import Ranks
from dar.training.sampling.sampler import Completion
from dar.training.step.records import ScoredStep

LEAST_ROWS = 16
"""Completions of a process below which a part is not cut further: smaller passes leave a GPU idle."""
MOST_PARTS = 8
"""Parts of a step: the last to be scored is then an eighth of the training that is left to do."""

Prompts = list[list[int]]
"""Numbers of prompts of a step, for each process."""


@dataclass(frozen=True, slots=True)
class StepPart:
    """Prompts whose completions are scored and weighed."""

    prompts: Prompts
    is_last: bool
    """Whether the optimizer steps after it."""


class Feed(Protocol):
    """Where the rewards of a step come from while it is trained on; all processes ask together."""

    def take(self, part: Prompts) -> Prompts:
        """Wait for the rewards of a part: of these prompts, or of as many others of each process.

        Returns:
            Prompts that are weighed now, and were not given before.
        """
        ...

    def refill(self) -> Prompts | None:
        """Once all are taken: prompts that were sampled again because too few of their completions had a reward."""
        ...

    def finish(self) -> None:
        """Wait for all rewards, and weigh all prompts at once."""
        ...


class StepInProgress:
    """A step whose completions are known, and whose rewards may still come.

    Args:
        step: The step.
        feed: Brings the rewards; None: they are known.
        sampled: Its completions as they were sampled; none where they were not.
    """

    def __init__(
        self, step: ScoredStep, feed: Feed | None = None, sampled: Sequence[Completion] = ()
    ) -> None:
        self.step = step
        self.sampled = tuple(sampled)
        self._feed = feed

    def finished(self) -> ScoredStep:
        """The step with all rewards and weights."""
        if self._feed is not None:
            self._feed.finish()
        return self.step

    def shares(self, ranks: Ranks, count: int, *, is_streamable: bool) -> list[Iterator[StepPart]]:
        """The parts of each of ``count`` shares; the shares are to be gone through in order."""
        most = max(1, MOST_PARTS // count) if self._feed is not None and is_streamable else 1
        plan = [_cut(share, self.step, most) for share in _shares(self.step, ranks, count)]
        return [self._parts(parts, is_last=i == count - 1) for i, parts in enumerate(plan)]

    def _parts(self, plan: Sequence[Prompts], *, is_last: bool) -> Iterator[StepPart]:
        for i, part in enumerate(plan):
            prompts = part if self._feed is None else self._feed.take(part)
            is_end = is_last and i == len(plan) - 1
            again = self._feed.refill() if is_end and self._feed is not None else None
            if again is not None:  # they count by now, and are trained on once
                prompts = _without(prompts, again)
            yield StepPart(prompts, is_last=is_end and again is None)
            if again is not None:
                yield StepPart(again, is_last=True)


def _shares(step: ScoredStep, ranks: Ranks, count: int) -> list[Prompts]:
    """For each share the prompts of each process."""
    own = [ranks.slice_of(index, len(step.prompts)) for index in range(ranks.count)]
    return [
        [list(one[len(one) * i // count : len(one) * (i + 1) // count]) for one in own]
        for i in range(count)
    ]


def _cut(share: Prompts, step: ScoredStep, most: int) -> list[Prompts]:
    """A share in parts; each process has its piece of every part."""
    rows = max(sum(step.counts[p] for p in prompts) for prompts in share)
    count = max(1, min(most, rows // LEAST_ROWS, max(map(len, share))))
    cuts = [[len(one) * i // count for i in range(count + 1)] for one in share]
    return [
        [one[a[i] : a[i + 1]] for one, a in zip(share, cuts, strict=True)] for i in range(count)
    ]


def _without(prompts: Prompts, others: Prompts) -> Prompts:
    left_out = set(flat(others))
    return [[p for p in one if p not in left_out] for one in prompts]


def flat(prompts: Prompts) -> list[int]:
    """Of all processes."""
    return list(itertools.chain(*prompts))
