"""The prompts of each step: a function of the seed and the step's number alone."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dar.training.config.config import DARConfig
from dar.training.data.rows import Prompt, PromptEncoder, Rows, naming_row
from dar.training.report.sink import Sink


class PromptOrder:
    """The row at each position of the stream of prompts: a function of seed and position alone.

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
        """Number of the row at ``position``; both count from 0."""
        epoch, index = divmod(position, self.row_count)
        return self._permutation(epoch)[index]


class PromptStream:
    """The prompts of each step: a function of the seed and the step's number.

    Args:
        rows: The data set.
        encoder: Makes token ids of a row.
        config: Batch size and seed.
        sink: Gets one warning if a prompt had to be cut.
    """

    def __init__(self, rows: Rows, encoder: PromptEncoder, config: DARConfig, sink: Sink) -> None:
        self._rows = rows
        self._encoder = encoder
        self.prompts_per_step = config.prompts_per_step
        self._order = PromptOrder(len(rows), config.seed)
        self._sink = sink
        self._has_warned = False

    def try_rows(self) -> None:
        """Check rows whose encoding may fail, before training reaches them.

        A chat template may refuse a conversation, and an empty text has no token unless the
        tokenizer has a BOS token.

        Raises:
            InvalidRequestError: A prompt cannot be encoded; the message names the row.
        """
        for index in range(len(self._rows)):
            row = self._rows[index]
            prompt = row.get("prompt")
            if not isinstance(prompt, str) or not prompt.strip():
                with naming_row(index):
                    self._encoder.check(row)

    def of_step(self, number: int) -> list[Prompt]:
        """The P prompts of step ``number``, from 1."""
        numbers = self.rows_of_step(number)
        prompts = [self._encode(row) for row in numbers]
        for row, prompt in zip(numbers, prompts, strict=True):
            if prompt.cut_tokens and not self._has_warned:
                self._has_warned = True
                self._sink.event(
                    "warn",
                    f"the prompt of row {row + 1} is {prompt.cut_tokens} tokens too long: its "
                    "beginning was cut off, as for every prompt that is too long",
                    {"kind": "prompt_cut", "row": row + 1, "cut_tokens": prompt.cut_tokens},
                )
        return prompts

    def rows_of_step(self, number: int) -> list[int]:
        """Numbers of the rows of step ``number``, from 0."""
        start = (number - 1) * self.prompts_per_step
        positions = range(start, start + self.prompts_per_step)
        return [self._order.row(position) for position in positions]

    def _encode(self, row: int) -> Prompt:
        with naming_row(row):
            return self._encoder(self._rows[row])

    def epoch(self, number: int) -> float:
        """Passes over the data set after step ``number``."""
        return number * self.prompts_per_step / self._order.row_count


class EvaluationStream(PromptStream):
    """All rows of the data set in every step, in their order."""

    def __init__(self, rows: Rows, encoder: PromptEncoder, config: DARConfig, sink: Sink) -> None:
        super().__init__(rows, encoder, config, sink)
        self.prompts_per_step = len(rows)

    def rows_of_step(self, number: int) -> list[int]:  # noqa: ARG002 - every step is the same
        return list(range(self.prompts_per_step))
