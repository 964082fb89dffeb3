"""Events: append-only facts about a job."""

from typing import Any, Literal

from dar.protocol.base import Output, UnixSeconds

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics", "sample"]


class Event(Output):
    """One fact about a job, as OpenAI's ``fine_tuning.job.event``."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: UnixSeconds
    seq: int
    """Position in the job's history, from 1. Events that are not listed leave gaps: rewound ones,
    and those of samples."""
    level: Level
    type: EventType
    """``sample``: samples of a step were stored. Lists have such events only if they are asked
    for."""
    message: str
    data: dict[str, Any] | None
    """For ``metrics``: the step and its values.

    For ``message``: ``kind`` (status, checkpoint, …) and the facts. For ``sample``: ``step``,
    ``attempt``, ``count``, and the lowest and highest reward.
    """
    rewound: bool = False
    """Whether it is about a step after the checkpoint from which a later attempt started, or with
    which the job has ended."""
