"""Models that a job may start from."""

from typing import Literal

from dar.protocol.base import Output, UnixSeconds


class Model(Output):
    """A base model or a fine-tuned one, as OpenAI's ``model``."""

    id: str
    object: Literal["model"]
    created: UnixSeconds
    owned_by: str
    kind: Literal["base", "fine_tuned"]
    job_id: str | None
    """The job that trained it."""
    checkpoint_id: str | None
