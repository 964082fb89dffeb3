"""How often one address may fail to show the right credential."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable


class FailureThrottle:
    """Counts failures by address, in this process; what succeeds is never held back.

    Many callers may share an address behind a proxy, so a stranger's failures must not shut out the others.

    Args:
        most: Failures of an address within ``seconds`` that are still answered as such.
        seconds: Length of the window that is counted in.
        addresses: Most addresses that are remembered; beyond that the longest unseen is forgotten.
        monotonic: Clock; replaced in tests.
    """

    def __init__(
        self,
        most: int = 60,
        seconds: float = 60.0,
        addresses: int = 10_000,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._seconds = seconds
        self._addresses = addresses
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def fail(self, address: str) -> float | None:
        """Count a failure; returns the seconds to wait when there were too many, else None."""
        now = self._monotonic()
        with self._lock:
            began, count = self._windows.pop(address, (now, 0))
            if now - began >= self._seconds:
                began, count = now, 0
            self._windows[address] = (began, count + 1)
            if len(self._windows) > self._addresses:
                self._windows.popitem(last=False)
        return None if count < self._most else self._seconds - (now - began)
