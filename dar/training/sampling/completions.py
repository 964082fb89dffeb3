"""What is sampled: completions, and who is told when all of a prompt's have ended."""

from collections.abc import Callable
from dataclasses import dataclass

from dar.protocol.samples import FinishReason


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled for a prompt."""

    ids: list[int]
    """Tokens, the end-of-sequence token included where there is one."""
    logp: float
    """Log-probability of the whole completion, in nats: under the law that sampled it, or with ``behavior="policy"`` under the
    policy at temperature 1 without filters."""
    finish_reason: FinishReason


OnGroup = Callable[[int, list[Completion]], None]
"""Takes the number of a prompt within the step and its K completions, as soon as the last of them has ended."""


class Done:
    """Completions that have ended, by row; tells of each prompt that has all of its own.

    Args:
        k: Completions of a prompt.
        on_group: Is told.
    """

    def __init__(self, k: int, on_group: OnGroup) -> None:
        self.rows: dict[int, Completion] = {}
        self._k = k
        self._on_group = on_group

    def add(self, row: int, completion: Completion) -> None:
        """Take in one more."""
        self.rows[row] = completion
        number = row // self._k
        rows = range(number * self._k, (number + 1) * self._k)
        if all(row in self.rows for row in rows):
            self._on_group(number, [self.rows[row] for row in rows])
