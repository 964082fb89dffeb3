"""The stream of a job: its history from any point, and then what happens."""

from typing import Literal, get_args

from dar.protocol.base import Output
from dar.protocol.events import Event
from dar.protocol.jobs import Job

StreamType = Literal["status", "event", "metrics", "sample", "checkpoint"]
STREAM_TYPES: tuple[StreamType, ...] = get_args(StreamType)


class StreamGap(Output):
    """Events that are no longer stored."""

    from_seq: int
    to_seq: int
    link: str
    """Path of what is still known about the job."""


class StreamFrame(Output):
    """One frame of a stream. None has a field ``error``: OpenAI's client would raise it."""

    type: Literal["status", "event", "metrics", "sample", "checkpoint", "gap", "done"]
    seq: int
    """Position in the job's history, which is the ``id`` of the frame; a reader
    continues after the last one that it got. Of ``gap`` and ``done``: the last one before."""
    event: Event | None = None
    gap: StreamGap | None = None
    """Of ``gap``: events that were deleted by age, or that the service does not know because its
    database is an older copy."""
    job: Job | None = None
    """Of ``done``: the job at its end. Without it the job was deleted."""
