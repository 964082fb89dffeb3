"""The cursor of the directives' long poll: directives that an attempt has received."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from dar.errors import InvalidRequestError
from dar.protocol.worker import FIRST_RESULT_ID, Directive

SEPARATOR = "."
JobDirective = Literal["cancel", "pause", "drain", "stop"]
ONCE: Mapping[JobDirective, int] = {"cancel": 1, "pause": 2, "drain": 3, "stop": 4}
"""Directives of the job itself, each sent at most once, with their numbers."""


@dataclass(frozen=True, slots=True)
class Received:
    """Directives that an attempt has received. As text: their numbers, joined by dots.

    Directives of the job itself are listed, because each is sent once. Results are sent in order,
    so the number of the newest one stands for all before it: ``1.1004``.
    """

    once: frozenset[int] = frozenset()
    """Numbers of the job's own directives, below `FIRST_RESULT_ID`."""
    last_result: int = 0
    """Number of the newest result; 0 for none."""

    @classmethod
    def parse(cls, text: str) -> "Received":
        """Parse a cursor.

        Raises:
            InvalidRequestError: It is malformed.
        """
        parts = text.split(SEPARATOR) if text else []
        if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
            raise InvalidRequestError(
                "after is not a cursor of this route; leave it out to start over", param="after"
            )
        numbers = [int(part) for part in parts]
        once = frozenset(number for number in numbers if number < FIRST_RESULT_ID)
        return cls(once, max((n for n in numbers if n >= FIRST_RESULT_ID), default=0))

    @classmethod
    def by_all(cls, received: "Collection[Received]") -> "Received":
        """What all of several cursors have in common."""
        once = frozenset.intersection(*(one.once for one in received))
        return cls(once, min(one.last_result for one in received))

    def has(self, directive: JobDirective) -> bool:
        """Whether the directive was received, or a cancellation, which replaces it."""
        return ONCE["cancel"] in self.once or ONCE[directive] in self.once

    @property
    def text(self) -> str:
        """The cursor as text."""
        numbers = sorted(self.once) + ([self.last_result] if self.last_result else [])
        return SEPARATOR.join(map(str, numbers))

    def plus(self, directives: list[Directive]) -> "Received":
        """The cursor after these directives."""
        numbers = [directive.id for directive in directives]
        once = self.once | {number for number in numbers if number < FIRST_RESULT_ID}
        return Received(
            once, max([self.last_result, *(n for n in numbers if n >= FIRST_RESULT_ID)])
        )
