"""The answer to a result that a reward service posts to a callback."""

from typing import Literal

from dar.protocol.base import Output


class CallbackAnswer(Output):
    """The result is stored."""

    status: Literal["accepted", "duplicate"]
    """``duplicate``: the same body was already stored."""
