"""`Pipeline`: when steps are sampled. ``overlap="one_step"`` samples one step ahead.

    none, stream     sample 1 | train 1 | sample 2 | train 2 | …
    one_step         sample 1 | sample 2 | train 1 | sample 3 | train 2 | …

So the rewards of step n may arrive while step n - 1 is trained and step n + 1 is sampled. The
price: step n + 1 is sampled by a policy that lacks one update.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from dar.protocol.spec import Overlap
from dar.training.sampling.sampler import Completion
from dar.training.step.reward_feed import StepInProgress


class BeginningSource(Protocol):
    """Begins steps whose rewards may still arrive."""

    def begin(
        self, number: int, *, staleness: int = 0, stored: Sequence[Completion] | None = None
    ) -> StepInProgress:
        """Sample step ``number``, or take its completions from ``stored``, and submit them.

        Raises:
            StopRequestedError: A stop was requested meanwhile; the completions are dropped.
        """


class Pipeline:
    """Returns the steps of a run in order.

    Args:
        source: Begins the steps.
        overlap: Whether one step is sampled ahead.
        last_step: The last step of the run.
    """

    def __init__(self, source: BeginningSource, *, overlap: Overlap, last_step: int) -> None:
        self._source = source
        self._is_ahead = overlap == "one_step"
        self._last_step = last_step
        self._ahead: StepInProgress | None = None
        self._state: dict[str, Any] | None = None

    def take(self, number: int) -> StepInProgress:
        """Step ``number``, sampled; its rewards may still arrive.

        Its times are those of this call, which may have sampled the next step.

        Raises:
            StopRequestedError: A stop was requested meanwhile. The completions are dropped, but
                `state` is still that of the end of the last step, so a checkpoint
                continues from there.
        """
        ahead, self._ahead = self._ahead, None
        taken = ahead or self._begin(number)
        if ahead is not None:
            ahead.step.seconds = {}
            ahead.step.idle_generation_seconds = 0.0
        if self._is_ahead and number < self._last_step:
            self._ahead = self._source.begin(number + 1, staleness=1)
            for name, seconds in self._ahead.step.seconds.items():
                taken.step.seconds[name] = taken.step.seconds.get(name, 0.0) + seconds
            taken.step.idle_generation_seconds += self._ahead.step.idle_generation_seconds
        return taken

    def _begin(self, number: int) -> StepInProgress:
        if self._state is None or self._state["step"] != number:
            return self._source.begin(number)
        stored = [
            Completion(ids, logp, finish_reason)
            for ids, logp, finish_reason in self._state["completions"]
        ]
        return self._source.begin(number, staleness=self._state["staleness"], stored=stored)

    def end(self) -> None:
        """The taken step is trained: a checkpoint written from now on begins with the next step."""
        self._state = None
        if self._ahead is not None:
            self._state = {
                "step": self._ahead.step.number,
                "staleness": self._ahead.step.staleness,
                "completions": [
                    [list(one.ids), one.logp, one.finish_reason] for one in self._ahead.sampled
                ],
            }

    def state(self) -> dict[str, Any] | None:
        """The step that was sampled ahead when the last step ended, as JSON."""
        return self._state

    def restore(self, state: dict[str, Any] | None) -> None:
        self._state = state
