"""What the service answers to a result that a reward service posts later."""

from typing import Literal

from dar.protocol.base import Output


class CallbackAnswer(Output):
    """The result is stored."""

    status: Literal["accepted", "duplicate"]
    """``duplicate``: the same body was stored before."""
