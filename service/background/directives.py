"""The cursor of the directives' long poll: what an attempt was told already."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from dar.errors import InvalidRequestError
from dar.protocol.worker import FIRST_RESULT_ID, Directive

SEPARATOR = "."
Wanted = Literal["cancel", "pause"]
ONCE: Mapping[Wanted, int] = {"cancel": 1, "pause": 2}
"""Directives of the job itself, each told at most once."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an attempt knows. As text it is numbers with dots between: ``1.1004``; nothing: empty.

    Directives of the job itself come once each, so their numbers are listed; results come in order, so the last one stands for all
    before it.
    """

    once: frozenset[int] = frozenset()
    """Directives below `FIRST_RESULT_ID`."""
    last_result: int = 0
    """Number of the newest result; 0: none."""

    @classmethod
    def parse(cls, text: str) -> "Told":
        """Read a cursor.

        Raises:
            InvalidRequestError: It is none of ours.
        """
        parts = text.split(SEPARATOR) if text else []
        if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
            raise InvalidRequestError(
                "after is not a cursor that this route has given; leave it out to begin anew",
                param="after",
            )
        numbers = [int(part) for part in parts]
        once = frozenset(number for number in numbers if number < FIRST_RESULT_ID)
        return cls(once, max((n for n in numbers if n >= FIRST_RESULT_ID), default=0))

    @classmethod
    def by_all(cls, told: "Collection[Told]") -> "Told":
        """What every one of several knows."""
        once = frozenset.intersection(*(one.once for one in told))
        return cls(once, min(one.last_result for one in told))

    def knows(self, wanted: Wanted) -> bool:
        """Whether this is no news: told already, or outranked by what was told."""
        return ONCE["cancel"] in self.once or ONCE[wanted] in self.once

    @property
    def text(self) -> str:
        """The cursor."""
        numbers = sorted(self.once) + ([self.last_result] if self.last_result else [])
        return SEPARATOR.join(map(str, numbers))

    def plus(self, directives: list[Directive]) -> "Told":
        """What it knows once it has these too."""
        numbers = [directive.id for directive in directives]
        once = self.once | {number for number in numbers if number < FIRST_RESULT_ID}
        return Told(once, max([self.last_result, *(n for n in numbers if n >= FIRST_RESULT_ID)]))
