"""What is in a training file, and what it can be used for."""

from typing import Literal

from dar.protocol.base import ErrorProblem, Output


class FileColumn(Output):
    """A column of a file."""

    name: str
    rows: int
    """Rows in which it has a value."""


class LengthBin(Output):
    """How many prompts have a length in a range."""

    least: int
    most: int
    count: int


class Lengths(Output):
    """How long prompts are."""

    counted: int
    """Prompts that were measured."""
    least: int
    most: int
    mean: float
    p50: int
    p95: int
    bins: list[LengthBin]
    """Ranges that double in width: 0, 1, 2-3, 4-7, …; those without a prompt are left out."""


class FileValidation(Output):
    """The rows of a training file, read again by today's rules."""

    object: Literal["file.validation"]
    file_id: str
    method: Literal["dar"]
    is_valid: bool
    """Whether all rows can be used."""
    num_rows: int
    """Rows that can be used."""
    fits_rewards: bool
    """Whether a job with rewards can train on it, which samples its own completions."""
    fits_stored_completions: bool
    """Whether a job without rewards can train on it, as it has completions with rewards, or
    preferences."""
    columns: list[FileColumn]
    characters: Lengths | None
    """Of the prompts, or of the messages of conversations; null: no row has a prompt."""
    model: str | None
    """The model whose tokens were counted."""
    tokens: Lengths | None
    """Of the prompts, without the chat template; of a large file, of some thousand prompts spread
    over it. Null: `tokens_note` says why."""
    tokens_note: str | None
    errors: list[ErrorProblem]
    """The first 50 rows that cannot be used."""
