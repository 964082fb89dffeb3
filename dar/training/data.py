"""Rows of prompts: what they may look like, how they become token ids, and in which order they are used."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dar.errors import InvalidRequestError

Row = Mapping[str, Any]


class Rows(Protocol):
    """Anything that holds rows by number: a list of dicts, a `datasets.Dataset`."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401 - data sets of many libraries
        """A row as a mapping."""
        ...


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A prompt and one completion of it, as token ids without padding."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]

    @property
    def total(self) -> int:
        """Tokens of both."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class DataCollatorForDAR:
    """Lays out prompts with completions as one rectangle.

    Prompts are padded on the left and completions on the right, so that all completions start in the same column and only
    the last columns need logits. Masks and positions come from lengths, never from token ids: a padding or end-of-sequence
    token inside a completion is a token like any other.
    """

    pad_token_id: int = 0
    """Stands where there is no token; what it is changes nothing."""

    def __call__(self, features: Sequence[TokenPair | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad.

        Args:
            features: B `TokenPair`, or mappings with ``prompt_ids`` and ``completion_ids``.

        Returns:
            ``input_ids``, ``attention_mask`` and ``position_ids`` ``[B, L + C]``, and ``completion_mask`` ``[B, C]``,
            true where a completion has a token; L and C are the longest prompt and completion.
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
class Prompt:
    """A row's prompt, ready for the model."""

    ids: list[int]
    text: str
    """As it stood in the row, or a conversation as the model reads it."""
    messages: Sequence[Mapping[str, Any]] | None
    """The conversation, where the row holds one."""
    columns: dict[str, Any]
    """All other columns of the row."""
    cut_tokens: int
    """How many tokens were cut off, from the left, to keep within the longest prompt."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file; blank lines are left out.

    Raises:
        InvalidRequestError: A line is not a JSON object; the message names it.
    """
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidRequestError(f"{path.name}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise InvalidRequestError(f"{path.name}, line {number}: not a JSON object")
            rows.append(row)
    return rows


def check_rows(rows: Rows, *, is_replay: bool = False) -> None:
    """Refuse a data set that could not be trained on, before anything is sampled.

    Args:
        rows: The data set.
        is_replay: Whether rows hold their completions; ``prompt_ids`` then stand for the prompt where a row has them.

    Raises:
        InvalidRequestError: There is no row, or a row has no usable prompt; the message names the row, from 1.
    """
    if len(rows) == 0:
        raise InvalidRequestError("the data set has no rows", param="training_file")
    for index in range(len(rows)):
        problem = _problem(rows[index], is_replay=is_replay)
        if problem:
            raise InvalidRequestError(f"row {index + 1}: {problem}", param="training_file")


def _problem(row: object, *, is_replay: bool) -> str | None:
    if not isinstance(row, Mapping):
        return "is not a mapping of columns"
    if is_replay and "completion_ids" not in row:
        return "has no completion_ids; give reward_funcs, or rows with completion_ids and rewards"
    if is_replay and "prompt_ids" in row:
        return None if row["prompt_ids"] else "prompt_ids is empty"
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, Sequence) or not prompt:
        return "prompt must be a text or a list of messages"
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return "each message of prompt must be an object with role and content"
    return None


class PromptEncoder:
    """Turns rows into token ids.

    Args:
        tokenizer: Of the model that is trained.
        max_prompt_length: Longest prompt in tokens. A longer conversation loses its earliest turns, but never what stands
            before the first; a longer text or last turn loses its beginning, but never its BOS token.
        is_replay: Whether ``prompt_ids`` stand for the prompt where a row has them; otherwise they are a column like any.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int,
        *,
        is_replay: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_prompt_length
        self._own_columns = {"prompt", "prompt_ids"} if is_replay else {"prompt"}

    def __call__(self, row: Row) -> Prompt:
        """Encode one row.

        Raises:
            InvalidRequestError: The prompt has no token, or is a conversation that the model's chat template refuses, or
                there is no template.
        """
        value = row.get("prompt")
        messages = None if value is None or isinstance(value, str) else list(value)
        shorter: Iterator[list[int]] = iter(())
        if "prompt_ids" in self._own_columns and "prompt_ids" in row:
            ids = list(row["prompt_ids"])
        elif messages is not None:
            ids = self._conversation(messages)
            shorter = self._without_early_turns(messages)
        else:
            ids = self._plain(str(value))
        if not ids:
            raise InvalidRequestError(
                f"the prompt {value!r} has no tokens, and the tokenizer has no BOS token to start from"
            )
        kept = self._cut(ids, shorter)
        return Prompt(
            ids=kept,
            text=value if isinstance(value, str) else str(self._tokenizer.decode(kept)),
            messages=messages,
            columns={name: row[name] for name in row if name not in self._own_columns},
            cut_tokens=len(ids) - len(kept),
        )

    def _plain(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        has_bos_text = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
        ids: list[int] = tokenizer(text, add_special_tokens=not has_bos_text)["input_ids"]
        if ids and ids[-1] == eos and not text.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]  # a tokenizer that closes texts would have us continue after the end
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "the prompts are conversations, but the model's tokenizer has no chat template; "
                "send plain texts or use an instruction-tuned model"
            )
        is_continued = messages[-1]["role"] == "assistant"
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=not is_continued,
                continue_final_message=is_continued,
                tokenize=True,
                return_dict=True,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses the conversation: {error}"
            ) from error
        return list(encoded["input_ids"])

    def _without_early_turns(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
        """The conversation without its first turn, without its first two, and so on to the last; a user begins a turn."""
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        for start in starts[1:]:
            yield self._conversation([*messages[: starts[0]], *messages[start:]])

    def _cut(self, ids: list[int], shorter: Iterator[list[int]]) -> list[int]:
        while len(ids) > self._max_length and (rest := next(shorter, None)):
            ids = rest
        if len(ids) <= self._max_length:
            return ids
        if ids[0] == self._tokenizer.bos_token_id:
            return [ids[0], *ids[len(ids) - self._max_length + 1 :]]
        return ids[-self._max_length :]


class PromptOrder:
    """Which row stands at each position of the endless stream of prompts: a function of seed and position alone.

    Every epoch is another permutation; a step may take its last prompts from the next epoch.
    """

    def __init__(self, row_count: int, seed: int) -> None:
        self.row_count = row_count
        self._seed = seed
        self._permutation = lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> Sequence[int]:
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        order: list[int] = np.random.Generator(bits).permutation(self.row_count).tolist()
        return order

    def row(self, position: int) -> int:
        """Number of the row at ``position``, both from 0."""
        epoch, index = divmod(position, self.row_count)
        return self._permutation(epoch)[index]
