"""What the retention of the service would delete."""

from typing import Literal

from dar.protocol.base import Output


class RetentionItem(Output):
    """Rows that would go by one setting."""

    what: str
    """``events``, ``reward_failures``, ``trainer_logs``, ``samples``, ``metrics``, ``digests`` (of
    rows of trainers), ``idempotency_keys`` or ``jobs`` (with their checkpoints and models)."""
    setting: str
    """The setting, without ``DAR_`` and in lower case."""
    limit: float
    """Its value, in days or bytes; 0: nothing goes by it."""
    rows: int
    bytes: int | None
    """Size of what goes, of samples and of checkpoints; null: it is not measured."""


class RetentionPreview(Output):
    """What would go if the retention ran now, and what there is."""

    object: Literal["retention.preview"]
    items: list[RetentionItem]
    deleted_jobs: int
    """Jobs that were deleted and whose rows are being removed."""
    samples_bytes: int
    """Size of all samples."""
    rows: dict[str, int]
    """Number of rows by table, of jobs and all that belongs to them."""
