"""What is in a stored training file, read again, and what it can be used for."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request

from dar.protocol.base import ErrorProblem
from dar.protocol.file_validation import FileColumn, FileValidation, LengthBin, Lengths
from dar.protocol.row_files import lines_of, read_lines
from service.api.files import while_connected
from service.http import downloads, errors
from service.http.auth import Submitter, User
from service.jobs import datasets, models
from service.jobs.model_checks import MAX_JSON_BYTES
from service.runtime import CurrentRuntime, Runtime
from service.store import files
from service.store.tables import FileRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dar.errors import Problem

router = APIRouter(prefix="/v1/files", tags=["files"])
MOST_TOKENIZED = 5000
"""Prompts whose tokens are counted; of a larger file, every second, third, … one."""
BATCH = 200
TOKENIZER = "tokenizer.json"


@router.post("/{file_id}/validate", responses=errors.may_answer(409))
async def validate_file(
    file_id: str,
    request: Request,
    runtime: CurrentRuntime,
    user: Submitter,
    method: Annotated[Literal["dar"], Query(description="For which method.")] = "dar",
    model: Annotated[
        str | None, Query(description="A model of the installation whose tokens are counted.")
    ] = None,
) -> FileValidation:
    """Read a file again: its columns, how long its prompts are, and which jobs can train on it."""
    del method
    return await while_connected(
        request, runtime, lambda has_left: _validate(runtime, user, file_id, model, has_left)
    )


def _validate(
    runtime: Runtime, user: User, file_id: str, model: str | None, has_left: Callable[[], bool]
) -> FileValidation:
    with runtime.database.read() as transaction:
        file = files.get(transaction, user.project_id, file_id)
    content = runtime.artifacts.open_file(file.id)
    if content is None:
        runtime.artifacts.storage.check_mounted()
        raise downloads.damaged_content(file.filename, "its content is missing")
    with content:
        return _read(runtime, file, content, model, has_left)


class _Reading:
    """What the rows of a file show, one after the other."""

    def __init__(self, stride: int, tokenizer: "Tokenizer | None") -> None:
        self.found = datasets.Dataset()
        self.columns = Counter[str]()
        self.characters = Counter[int]()
        self.tokens = Counter[int]()
        self._stride = stride
        self._tokenizer = tokenizer
        self._waiting: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        self.found.add(row)
        self.columns.update(name for name, value in row.items() if value is not None)
        is_counted = self.found.num_rows % self._stride == 1 % self._stride
        ids, prompt = row.get("prompt_ids"), row.get("prompt")
        if ids is not None:
            if is_counted:
                self.tokens[len(ids)] += 1
        elif prompt is not None:
            text = prompt if isinstance(prompt, str) else "\n".join(_texts(prompt))
            self.characters[len(text)] += 1
            if is_counted and self._tokenizer is not None:
                self._waiting.append(text)
                if len(self._waiting) >= BATCH:
                    self.count()

    def count(self) -> None:
        """Count the tokens of the prompts that wait for it."""
        if self._tokenizer is not None and self._waiting:
            made = self._tokenizer.encode_batch(self._waiting, add_special_tokens=False)
            self.tokens.update(len(one.ids) for one in made)
            self._waiting.clear()


def _read(
    runtime: Runtime,
    file: FileRow,
    content: BinaryIO,
    model: str | None,
    is_cancelled: Callable[[], bool],
) -> FileValidation:
    """Read all rows of a file, and count the tokens of a model of the installation.

    Args:
        runtime: Where the models are.
        file: The file.
        content: Its content.
        model: The model; None: no tokens are counted.
        is_cancelled: Polled at each row.

    Raises:
        UploadCancelledError: ``is_cancelled`` returned true.
    """
    tokenizer, note = _tokenizer(runtime, model)
    reading = _Reading(max(1, -(-file.num_rows // MOST_TOKENIZED)), tokenizer)
    problems: list[Problem] = []

    def lines() -> Iterator[bytes]:
        for line in lines_of(content):
            if is_cancelled():
                raise datasets.UploadCancelledError
            yield line

    for row in read_lines(lines(), problems):
        reading.add(row)
    reading.count()
    tokens = _lengths(reading.tokens)
    if tokens is None and note is None:
        note = "no row has a prompt of its own"
    uses = datasets.uses_of(reading.found.columns)
    return FileValidation(
        object="file.validation",
        file_id=file.id,
        method="dar",
        is_valid=not problems,
        num_rows=reading.found.num_rows,
        fits_rewards=not problems and "rewards" in uses,
        fits_stored_completions=not problems and "stored_completions" in uses,
        columns=[FileColumn(name=name, rows=n) for name, n in sorted(reading.columns.items())],
        characters=_lengths(reading.characters),
        model=None if tokenizer is None else model,
        tokens=tokens,
        tokens_note=note if tokens is None else None,
        errors=[
            ErrorProblem(param=one.param, message=one.message, code=one.code, row=one.row)
            for one in problems
        ],
    )


def _tokenizer(runtime: Runtime, model: str | None) -> "tuple[Tokenizer | None, str | None]":
    """The tokenizer of a model, or why there is none."""
    if model is None:
        return None, "no model was named whose tokens could be counted"
    folder = models.folder_of(runtime.settings, model)
    if folder is None:
        return None, (
            f"{model!r} is no folder of the models directory, and only a tokenizer that the operator "
            "has installed is read by the service; name the base model"
        )
    path = folder / TOKENIZER
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        return None, f"model {model!r} has no {TOKENIZER} that the service could read"
    # It takes 50 ms, and the service starts without it.
    from tokenizers import Tokenizer  # noqa: PLC0415 - slow to import, see above

    try:
        return Tokenizer.from_file(str(path)), None
    except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself
        return None, f"the {TOKENIZER} of model {model!r} cannot be read: {error}"


def _texts(messages: list[Any]) -> Iterator[str]:
    """The texts of a conversation; parts that are no text have no length."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (str(part.get("text") or "") for part in content if isinstance(part, dict))


def _lengths(counts: Counter[int]) -> Lengths | None:
    total = counts.total()
    if total == 0:
        return None
    bins = Counter[int]()
    for length, count in counts.items():
        bins[length.bit_length()] += count
    return Lengths(
        counted=total,
        least=min(counts),
        most=max(counts),
        mean=sum(length * count for length, count in counts.items()) / total,
        p50=_quantile(counts, total, 0.5),
        p95=_quantile(counts, total, 0.95),
        bins=[
            LengthBin(least=(1 << bits) >> 1, most=(1 << bits) - 1, count=bins[bits])
            for bits in sorted(bins)
        ],
    )


def _quantile(counts: Counter[int], total: int, share: float) -> int:
    """The smallest length that at least this share of the prompts does not exceed."""
    seen = 0
    for length in sorted(counts):
        seen += counts[length]
        if seen >= share * total:
            return length
    return max(counts)
