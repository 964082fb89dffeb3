"""The cursor of the directives' long poll: what an attempt was told already."""

from dataclasses import dataclass

from dar.errors import InvalidRequestError
from dar.protocol.worker import FIRST_RESULT_ID, Directive

SEPARATOR = "."


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
