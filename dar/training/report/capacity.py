"""`Capacity`: warns if a reward service is too slow, with the concurrency that would suffice.

Overlap hides latency, not lack of capacity. By queueing theory (Little) a service that has C
requests in flight, each for b groups and of mean latency E[L], needs S = G E[L] / (C b) for the G
groups of a step. All of it is hidden only while S is below the time that a step takes anyway,
T = sampling + training. So C has to be at least 1.5 E[L] G / (b T), where 1.5 is a margin for
stragglers. S is measured by the rate at which responses for groups arrive, so neither E[L] nor b
needs to be known: the C that is needed is 1.5 C S / T.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dar.protocol.hints import HINTS
from dar.protocol.reward_spec import MAX_CONCURRENCY
from dar.rewards.scoring.in_flight import Ticket
from dar.training.report.sink import Sink


class Capacity:
    """Measures the rate of the reward services of a run.

    Args:
        concurrency: Most requests in flight, for each component that has such a limit.
        sink: Gets the warnings.
    """

    def __init__(self, concurrency: Mapping[str, int], sink: Sink) -> None:
        self._concurrency = dict(concurrency)
        self._sink = sink
        self._seconds: dict[str, float] = {}
        self._warned: dict[str, int] = {}

    def end_rewards(self, tickets: Sequence[Ticket]) -> None:
        """Record the responses of a step."""
        self._seconds = {
            name: service_seconds([t.answered_at[name] for t in tickets if name in t.answered_at])
            for name in self._concurrency
        }

    def end_step(self, number: int, times: Mapping[str, float]) -> None:
        """Compare them with the rest of the step's time, and warn if a service is too slow.

        Args:
            number: Number of the step.
            times: The step's metrics ``time/…_seconds``.
        """
        phases = ("sampling", "reference", "training")
        busy = sum(times.get(f"time/{phase}_seconds", 0.0) for phase in phases)
        seconds, self._seconds = self._seconds, {}
        waited = times.get("time/idle_reward_seconds", 0.0)
        if waited < HINTS.capacity_least_wait * times.get("time/step_seconds", 0.0):
            return
        for name, needed_seconds in seconds.items():
            needed = needed_concurrency(self._concurrency[name], needed_seconds, busy)
            repeated = HINTS.capacity_repeated * self._warned.get(name, 0)
            if needed_seconds <= busy or needed < repeated:
                continue
            self._warned[name] = needed
            self._sink.event(
                "warn",
                f"reward component {name} takes {needed_seconds:.3g} s for a step's prompts, but "
                f"sampling and training take only {busy:.3g} s, so the trainer waits for it; "
                f"{advice(self._concurrency[name], needed)}",
                {
                    "kind": "reward_capacity",
                    "step": number,
                    "component": name,
                    "concurrency": self._concurrency[name],
                    "needed_concurrency": needed,
                },
            )

    def state(self) -> dict[str, Any]:
        """The concurrency that was advised for each component, as JSON."""
        return {"warned": self._warned}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`, so that no warning is repeated."""
        self._warned = dict(state["warned"])


def advice(concurrency: int, needed: int) -> str:
    """How to hide a slow service, within the limits of a job spec."""
    if concurrency >= MAX_CONCURRENCY:
        return (
            f"its limits.concurrency is {concurrency}, the most there is, so make the service "
            "faster, or score fewer completions in a step"
        )
    if needed > MAX_CONCURRENCY:
        return (
            f"about {needed} requests at once would hide that, more than the {MAX_CONCURRENCY} "
            f"that are allowed: raise its limits.concurrency from {concurrency} as far as the "
            "service can handle, and make the service faster"
        )
    return (
        f"raise its limits.concurrency from {concurrency} to at least {needed}, if the service can "
        "handle that"
    )


def service_seconds(answered_at: Sequence[float]) -> float:
    """Time that a service needs for a step: the interval between responses times their number.

    Args:
        answered_at: Time of each group's response, in seconds.

    Returns:
        0 if there are too few responses.
    """
    count = math.ceil(HINTS.capacity_counted * len(answered_at))
    if len(answered_at) < HINTS.capacity_least_groups:
        return 0.0
    times = sorted(answered_at)[:count]
    return (times[-1] - times[0]) / (count - 1) * len(answered_at)


def needed_concurrency(concurrency: int, service: float, busy: float) -> int:
    """Requests in flight that would hide a service behind the rest of a step.

    Args:
        concurrency: The present number.
        service: Seconds that the service needs for a step with that number.
        busy: Seconds of sampling and training in a step.
    """
    return math.ceil(HINTS.capacity_margin * concurrency * service / max(busy, 1e-9))
