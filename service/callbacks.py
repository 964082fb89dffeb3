"""What one process knows of the callbacks of reward services: counts by outcome, and who fails too often."""

import threading
from collections import Counter

from service.http.rate_limits import FailureThrottle

OUTCOMES = (
    "accepted", "duplicate", "conflict", "late", "closed", "burned", "invalid", "refused", "unsupported", "too_large",
)  # fmt: skip
"""Those of `service.store.reward_requests.CallbackOutcome` but ``replayed``, which is refused, and what is turned away before."""


class Callbacks:
    """Counts of callbacks since the process started, by outcome, and the throttle of wrong credentials."""

    def __init__(self) -> None:
        self.failures = FailureThrottle()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, outcome: str) -> None:
        """Count one; from any thread."""
        with self._lock:
            self._counts[outcome] += 1

    def counts(self) -> dict[str, int]:
        """How many there were of each outcome."""
        with self._lock:
            return dict(self._counts)
