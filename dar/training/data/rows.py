"""Rows of data sets: their checks, the token ids of their prompts, and batches of these."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dar.errors import InvalidRequestError, Problem
from dar.protocol.row_files import RowChecker, invalid_file, lines_of, read_array, read_lines
from dar.protocol.rows import (
    TEMPLATE_COLUMN,
    Message,
    Row,
    check_use,
    read_prompt,
    template_kwargs,
)
from dar.protocol.samples import FinishReason
from dar.rewards.http.wire import check_sendable
from dar.training.data.chat import rendered_chat
from dar.training.data.codec import TextCodec, common_length

BUFFER_BYTES = 64 * 1024
SHOWN_COLUMNS = 16
"""Columns that a message lists."""


class Rows(Protocol):
    """Rows by number, each a mapping of columns: a list of dicts, a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401 - data sets of many libraries


@dataclass(frozen=True, slots=True)
class ColumnUse:
    """The columns that rewards read, beside prompts and completions."""

    sent: Sequence[str] = ()
    """Sent to reward services."""
    needed: Mapping[str, str] = field(default_factory=dict)
    """Columns that there must be, each with what needs it, in words."""


NO_COLUMNS = ColumnUse()


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A prompt and one completion of it, as token ids without padding."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]

    @property
    def total(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class DataCollatorForDAR:
    """Pads prompts with completions to one batch for a forward pass.

    Prompts are padded on the left and completions on the right, so that all completions start in
    the same column and only the last columns need logits. Masks and positions come from lengths,
    never from token ids: a padding or end-of-sequence token inside a completion is a token like any
    other, so the end is trained also where the tokenizer pads with its end-of-sequence token.
    Nothing is appended, cut or tokenized: `dar.training.data.rows.PromptEncoder` and
    `dar.training.step.offline.RowEncoder` do that before.

    ```python
    collate = DataCollatorForDAR()
    batch = collate(
        [
            {"prompt_ids": [5, 6, 7], "completion_ids": [8, 2]},
            {"prompt_ids": [5], "completion_ids": [9]},
        ]
    )
    batch["input_ids"]  # [[5, 6, 7, 8, 2], [0, 0, 5, 9, 0]]
    batch["position_ids"]  # [[0, 1, 2, 3, 4], [0, 0, 0, 1, 1]]
    batch["completion_mask"]  # [[True, True], [True, False]]
    ```

    Args:
        pad_token_id: Fills places without a token. Attention never sees it, so its value changes
            nothing; default 0, which every vocabulary has (a tokenizer's own padding token may lie
            beyond the model's embeddings).
    """

    pad_token_id: int = 0

    def __call__(self, features: Sequence[TokenPair | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad prompts and completions to one batch.

        Args:
            features: B `TokenPair`, or mappings with ``prompt_ids`` and ``completion_ids`` (other
                keys are ignored); at least one, and each with at least one token.

        Returns:
            With L and C the most tokens of a prompt and of a completion: ``input_ids``,
            ``attention_mask`` (1 where there is a token) and ``position_ids`` (counted from 0 at
            the first token of each row), all int64 ``[B, L + C]``; and ``completion_mask``, bool
            ``[B, C]``, true where a completion has a token.

        Raises:
            KeyError: A mapping lacks one of the two keys.
        """
        pairs = [
            feature
            if isinstance(feature, TokenPair)
            else TokenPair(feature["prompt_ids"], feature["completion_ids"])
            for feature in features
        ]
        prompt_width = max(len(pair.prompt_ids) for pair in pairs)
        width = prompt_width + max(len(pair.completion_ids) for pair in pairs)
        ids_BT = torch.full((len(pairs), width), self.pad_token_id, dtype=torch.long)
        attention_BT = torch.zeros_like(ids_BT)
        for row, pair in enumerate(pairs):
            start = prompt_width - len(pair.prompt_ids)
            span = slice(start, start + pair.total)
            ids_BT[row, span] = torch.tensor([*pair.prompt_ids, *pair.completion_ids])
            attention_BT[row, span] = 1
        return {
            "input_ids": ids_BT,
            "attention_mask": attention_BT,
            "position_ids": (attention_BT.cumsum(dim=1) - 1).clamp(min=0),
            "completion_mask": attention_BT[:, prompt_width:].bool(),
        }


@dataclass(frozen=True, slots=True)
class StoredCompletion:
    """A completion of the data set."""

    ids: list[int]
    finish_reason: FinishReason
    """``length``: it was cut on the right, or has no end-of-sequence token at its end."""
    reward: float | None
    """None: missing."""
    behavior_logp: float | None
    """Sum over its tokens, in nats; None: unknown."""
    prompt_ids: list[int] | None = None
    """The prompt's tokens before this completion, where they differ from those of the row."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row's prompt, ready for the model."""

    ids: list[int]
    text: str
    """The text of the row, or a conversation as the model reads it."""
    messages: Sequence[Mapping[str, Any]] | None
    """The conversation, where the row holds one."""
    columns: dict[str, Any]
    """All other columns of the row."""
    cut_tokens: int
    """Tokens that were cut off on the left, to keep within the longest prompt."""
    completions: tuple[StoredCompletion, ...] = ()
    """Offline: the completions of the row. Online: empty."""
    changed_text: tuple[str, str] | None = None
    """Offline: a completion that the tokenizer cannot reproduce, and what its tokens say."""
    is_preference: bool = False
    """Whether the completions are a chosen and a rejected one."""


class FileRows(list[dict[str, Any]]):
    """The rows of a file, which were checked when they were read."""


def read_rows(path: Path, param: str = "training_file") -> FileRows:
    """Read a JSON Lines file, or with the suffix ``.json`` also a JSON array, and check its rows.

    Args:
        path: The file.
        param: The parameter that named it.

    Raises:
        InvalidRequestError: A row cannot be used; the message names it.
    """
    problems: list[Problem] = []
    with path.open("rb") as file:
        start = file.read(BUFFER_BYTES).lstrip()
        file.seek(0)
        if path.suffix == ".json" and start.startswith(b"["):
            rows = FileRows(read_array(file.read(), problems))
        else:
            rows = FileRows(read_lines(lines_of(file), problems))
    if problems:
        raise invalid_file(problems, name=path.name, param=param)
    return rows


def check_rows(rows: Rows, *, is_replay: bool = False, columns: ColumnUse = NO_COLUMNS) -> None:
    """Reject a data set that could not be trained on, before anything is loaded or sampled.

    Args:
        rows: The data set.
        is_replay: Whether rows hold their completions and rewards: offline training.
        columns: What rewards read.

    Raises:
        InvalidRequestError: It is not a data set with rows, a column is missing, or a row cannot be
            used; the message names the row, from 1, and the column.
    """
    check_table(rows)
    with naming_row(0):
        first = rows[0]
        if isinstance(first, Mapping):
            check_use(first, is_replay=is_replay)  # all others have its format
    if isinstance(rows, FileRows):
        _check_needed(rows, columns.needed)
        return
    checker = RowChecker()
    for index in range(len(rows)):
        row = rows[index]
        with naming_row(index):
            checker.check(row, index + 1)
            check_sendable(row, columns.sent)
    for problem in checker.lacks([]):
        raise InvalidRequestError(problem.message, param="training_file", code=problem.code)
    _check_needed(rows, columns.needed)


def _check_needed(rows: Rows, needed: Mapping[str, str]) -> None:
    """Reject a data set of which no row has a column that a reward source needs."""
    lacking = dict(needed)
    there: dict[str, None] = {}
    for index in range(len(rows)):
        if not lacking:
            return
        there |= dict.fromkeys(rows[index])
        lacking = {name: what for name, what in lacking.items() if name not in there}
    for name, what in lacking.items():
        raise InvalidRequestError(
            f"no row has the column {name!r}, which {what} needs; the rows have: "
            f"{', '.join(map(str, list(there)[:SHOWN_COLUMNS]))}",
            param="training_file",
            code="missing_column",
        )


def check_table(rows: Rows) -> None:
    """Reject a data set that is not a table of rows.

    Raises:
        InvalidRequestError: It is a dictionary of splits, a path or a table of columns, has no
            length, or is empty.
    """
    if isinstance(rows, str | bytes | Path):
        raise InvalidRequestError(
            f"the data set is the text or path {str(rows)!r:.80}; load it first: "
            "datasets.load_dataset",
            param="training_file",
        )
    if isinstance(rows, Mapping):
        names = ", ".join(map(str, rows))
        raise InvalidRequestError(
            f"the data set is a dictionary of splits ({names}); pass one of them",
            param="training_file",
        )
    if not hasattr(rows, "__len__"):
        raise InvalidRequestError(
            f"data of the type {type(rows).__name__} cannot be trained on: rows are read by number, in a random "
            "order, so a data set needs a length; load it without streaming",
            param="training_file",
        )
    if len(rows) == 0:
        raise InvalidRequestError("the data set has no rows", param="training_file")
    try:
        rows[0]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidRequestError(
            f"data of the type {type(rows).__name__} cannot be read by the number of a row; give a list of dicts "
            "or a datasets.Dataset (of a table of pandas: Dataset.from_pandas)",
            param="training_file",
        ) from error


@contextlib.contextmanager
def naming_row(index: int) -> Iterator[None]:
    """Add the row's number to the message of an error inside; ``index`` counts from 0.

    Raises:
        InvalidRequestError: One was raised inside.
    """
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(f"row {index + 1}: {error}", param="training_file") from error


class PromptEncoder:
    """Turns rows into token ids.

    Args:
        tokenizer: The tokenizer of the model that is trained.
        max_prompt_length: Longest prompt in tokens. A longer conversation loses its earliest turns,
            but never the messages before the first turn. A longer last turn loses the beginning of
            its text, and a longer text its beginning, but never its BOS token.
        variables: Variables of the chat template, where a row has no others.
    """

    own_columns: frozenset[str] = frozenset({"prompt"})
    """Columns that are not passed to reward functions."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._codec = TextCodec(tokenizer)
        self._max_length = max_prompt_length
        self._variables = dict(variables or {})

    def variables_of(self, row: Row) -> dict[str, Any]:
        """Variables of the chat template for a row: its own before those of all rows."""
        return self._variables | template_kwargs(row.get(TEMPLATE_COLUMN), TEMPLATE_COLUMN)

    def __call__(self, row: Row) -> Prompt:
        """Encode one row.

        Raises:
            InvalidRequestError: There is no prompt, it has no token, or it is a conversation and
                the model's chat template rejects it or is missing.
        """
        prompt = read_prompt(row)
        ids = self.encoded(prompt, self.variables_of(row))
        return self.fitted(row, prompt, ids, self._max_length)

    def check(self, row: Row) -> None:
        """Raise the errors of `__call__`, mostly without tokenizing, which is 20 times slower.

        Raises:
            InvalidRequestError: See `__call__`.
        """
        prompt = read_prompt(row)
        if isinstance(prompt, str) or self._needs_tokens(
            prompt, self.rendered(prompt, self.variables_of(row)), self._max_length
        ):
            self(row)

    def _needs_tokens(self, prompt: Sequence[Message], text: str, longest: int) -> bool:
        """Whether only tokenizing can show an error: it may have no token, or lose turns."""
        turns = sum(message["role"] == "user" for message in prompt)
        # Nearly every token has at least one byte.
        return not text.strip() or (turns > 1 and len(text.encode()) > longest)

    def encoded(self, prompt: str | Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
        """All token ids of a prompt.

        Args:
            prompt: A text or a conversation.
            variables: Variables of the chat template.

        Raises:
            InvalidRequestError: There are none; see `__call__`.
        """
        if isinstance(prompt, str):
            ids = self._plain(prompt)
        else:
            ids = self.bare(self.rendered(prompt, variables))
        if not ids:
            raise InvalidRequestError(
                f"the prompt {prompt!r:.80} has no tokens, and the tokenizer has no BOS token to "
                "start from"
            )
        return ids

    def fitted(
        self, row: Row, prompt: str | Sequence[Message] | None, ids: list[int], longest: int
    ) -> Prompt:
        """The prompt of a row, cut to ``longest`` tokens; ``prompt`` is None for rows of ids."""
        messages = None if prompt is None or isinstance(prompt, str) else list(prompt)
        kept = ids if len(ids) <= longest else self._cut(row, ids, messages, longest)
        return Prompt(
            ids=kept,
            text=prompt if isinstance(prompt, str) else self._codec.decode(kept),
            messages=messages,
            columns={name: row[name] for name in row if name not in self.own_columns},
            cut_tokens=len(ids) - len(kept),
        )

    def _plain(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        bos = tokenizer.bos_token_id
        has_bos_text = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
        ids: list[int] = tokenizer(text, add_special_tokens=not has_bos_text)["input_ids"]
        count = 0 if has_bos_text else len(self._codec.closing_ids)
        if count and ids[-count:] == self._codec.closing_ids:
            ids = ids[:-count]  # some tokenizers end every text, and a prompt must stay open
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def rendered(
        self, messages: Sequence[Message], variables: Mapping[str, Any], *, is_whole: bool = False
    ) -> str:
        """A conversation as the model reads it, up to the model's turn, or whole.

        Args:
            messages: The conversation.
            variables: Variables of the chat template.
            is_whole: Whether the last message ends.

        Raises:
            InvalidRequestError: The chat template rejects it, fails or is missing.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "the prompts are conversations, but the model's tokenizer has no chat template; "
                "send plain texts, or use an instruction-tuned model"
            )
        is_continued = messages[-1]["role"] == "assistant"
        return rendered_chat(
            self._tokenizer,
            messages,
            variables,
            whose="the model",
            add_generation_prompt=not is_continued and not is_whole,
            continue_final_message=is_continued and not is_whole,
        )

    def bare(self, text: str) -> list[int]:
        """Token ids of exactly this text."""
        return self._codec.bare(text)

    def _cut(
        self, row: Row, ids: list[int], messages: Sequence[Message] | None, longest: int
    ) -> list[int]:
        variables = self.variables_of(row)
        for rest in without_early_turns(messages or ()):
            ids = self.bare(self.rendered(rest, variables))
            messages = rest
            if len(ids) <= longest:
                return ids
        head = self._head(ids, messages, variables)
        if head >= longest:
            head = int(ids[0] == self._tokenizer.bos_token_id)
        return [*ids[:head], *ids[len(ids) - longest + head :]]

    def _head(
        self, ids: list[int], messages: Sequence[Message] | None, variables: Mapping[str, Any]
    ) -> int:
        """Number of tokens before the text of the last turn; for a plain text, its BOS token."""
        if messages is not None:
            emptied = [*messages[:-1], {**messages[-1], "content": ""}]
            with contextlib.suppress(InvalidRequestError):  # some templates refuse empty texts
                return common_length(ids, self.bare(self.rendered(emptied, variables)))
        return int(ids[0] == self._tokenizer.bos_token_id)


def without_early_turns(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The conversation without its first turn, its first two, and so on; users start turns."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start in starts[1:]:
        yield [*messages[: starts[0]], *messages[start:]]
