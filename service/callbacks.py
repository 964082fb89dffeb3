"""What one process knows of the callbacks of reward services: counts by outcome, and who fails too often."""

import threading
from collections import Counter

from service.throttle import FailureThrottle


class Callbacks:
    """Counts of callbacks since the process started, by outcome, and the throttle of wrong credentials.

    The outcomes are those of `service.store.reward_requests.Fate` but ``replayed``, and ``refused``, ``unsupported`` and
    ``too_large``.
    """

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
