"""`Capacity`: says when a reward service cannot keep up, and how many requests at once would do.

Overlapping hides latency, not lack of capacity. By Little's law a service that has C requests in flight, each for b groups and of
mean latency E[L], needs S = G E[L] / (C b) for the G groups of a step. All of it is hidden only while S is below the time that a
step takes anyway, T = sampling + training; so C has to be at least 1.5 E[L] G / (b T), with half as much again for stragglers.
S is measured as the pace at which groups were answered, so neither E[L] nor b needs to be known: the C that is needed is 1.5 C S / T.
"""

import math
from collections.abc import Mapping, Sequence

from dar.rewards.scoring.in_flight import Ticket
from dar.training.report.sink import Sink

MARGIN = 1.5
"""For stragglers."""
COUNTED = 0.8
"""Share of the groups whose pace is measured: the last to be answered say more about stragglers than about capacity."""
LEAST_WAIT = 0.05
"""Share of a step that has to be waited before anything is said."""
LEAST_GROUPS = 4
"""Groups without which there is no pace."""
LOUDER = 1.25
"""How much more has to be needed before it is said again."""


class Capacity:
    """Watches the pace of the reward services of a run.

    Args:
        concurrency: Most requests in flight, for each component that has such a limit.
        sink: Is told what is needed.
    """

    def __init__(self, concurrency: Mapping[str, int], sink: Sink) -> None:
        self._concurrency = dict(concurrency)
        self._sink = sink
        self._seconds: dict[str, float] = {}
        self._said: dict[str, int] = {}

    def end_rewards(self, tickets: Sequence[Ticket]) -> None:
        """Take in the answers of a step."""
        self._seconds = {
            name: service_seconds([t.answered_at[name] for t in tickets if name in t.answered_at])
            for name in self._concurrency
        }

    def end_step(self, number: int, times: Mapping[str, float]) -> None:
        """Compare them with what else the step took, and say what is needed.

        Args:
            number: Of the step.
            times: Its metrics ``time/…_seconds``.
        """
        phases = ("sampling", "reference", "training")
        busy = sum(times.get(f"time/{phase}_seconds", 0.0) for phase in phases)
        seconds, self._seconds = self._seconds, {}
        waited = times.get("time/idle_reward_seconds", 0.0)
        if waited < LEAST_WAIT * times.get("time/step_seconds", 0.0):
            return
        for name, needed_seconds in seconds.items():
            needed = needed_concurrency(self._concurrency[name], needed_seconds, busy)
            if needed_seconds <= busy or needed < LOUDER * self._said.get(name, 0):
                continue
            self._said[name] = needed
            self._sink.event(
                "warn",
                f"reward component {name} takes {needed_seconds:.3g} s for a step's prompts, but sampling and training take only "
                f"{busy:.3g} s, so the trainer waits for it; raise its limits.concurrency from {self._concurrency[name]} to at "
                f"least {needed}, if the service can bear that",
                {
                    "kind": "reward_capacity",
                    "step": number,
                    "component": name,
                    "concurrency": self._concurrency[name],
                    "needed_concurrency": needed,
                },
            )


def service_seconds(answered_at: Sequence[float]) -> float:
    """What a service needs for a step: the pace of its answers times their number.

    Args:
        answered_at: When each group was answered, in seconds.

    Returns:
        0 where there are too few to have a pace.
    """
    count = math.ceil(COUNTED * len(answered_at))
    if len(answered_at) < LEAST_GROUPS:
        return 0.0
    times = sorted(answered_at)[:count]
    return (times[-1] - times[0]) / (count - 1) * len(answered_at)


def needed_concurrency(concurrency: int, service: float, busy: float) -> int:
    """Requests in flight that would hide a service behind the rest of a step.

    Args:
        concurrency: As it is.
        service: Seconds that the service needs for a step with it.
        busy: Seconds of sampling and training in a step.
    """
    return math.ceil(MARGIN * concurrency * service / max(busy, 1e-9))
