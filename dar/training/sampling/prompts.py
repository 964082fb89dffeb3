"""The prompts of each step: a function of the seed and the step's number alone."""

from typing import Any

import numpy as np

from dar.training.config.config import DARConfig
from dar.training.data.rows import Prompt, PromptEncoder, Rows, naming_row
from dar.training.report.sink import Sink


class PromptOrder:
    """The row at each position of the stream of prompts: a function of seed and position alone.

    Every epoch is another permutation; a step may take its last prompts from the next epoch.

    Args:
        row_count: Rows of the data set.
        seed: Of the run.
        distinct: Positions of a step, if no step may take a row twice: then the rows that a step
            has taken at the end of an epoch come later in the next one. At most ``row_count``.
    """

    def __init__(self, row_count: int, seed: int, distinct: int | None = None) -> None:
        self.row_count = row_count
        self._seed = seed
        self._distinct = distinct
        self._known: dict[int, list[int]] = {}
        """Permutations of the last epochs that were asked for."""

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._known:
            # Each depends on the one before, so all are made that are not known.
            first = max((known + 1 for known in self._known if known < epoch), default=0)
            if not self._distinct or self.row_count % self._distinct == 0:
                first = epoch
            for one in range(first, epoch + 1):
                self._known[one] = self._without_repetition(one, self._draw(one))
                self._known.pop(one - 2, None)
        return self._known[epoch]

    def _without_repetition(self, epoch: int, order: list[int]) -> list[int]:
        """The same order, but without the rows at its start that its first step has already."""
        taken = (epoch * self.row_count) % self._distinct if self._distinct else 0
        if not taken:
            return order
        assert self._distinct is not None
        before = set(self._known[epoch - 1][-taken:])
        free = [row for row in order if row not in before][: self._distinct - taken]
        chosen = set(free)
        return [*free, *(row for row in order if row not in chosen)]

    def _draw(self, epoch: int) -> list[int]:
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
        config: Batch size, length and seed.
        sink: Gets one warning if a prompt had to be cut, and one if the tokenizer cannot reproduce
            a completion.
        is_replay: Whether the rows hold their completions.
    """

    def __init__(
        self,
        rows: Rows,
        encoder: PromptEncoder,
        config: DARConfig,
        sink: Sink,
        *,
        is_replay: bool = False,
    ) -> None:
        self._rows = rows
        self._encoder = encoder
        self._plan = plan = config.step_plan(len(rows), is_replay=is_replay)
        distinct = plan.per_step if plan.is_distinct else None
        self._order = PromptOrder(len(rows), config.seed, distinct)
        self._sink = sink
        self._warned: set[str] = set()

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
            if prompt.cut_tokens:
                self._warn_once(
                    f"the prompt of row {row + 1} is {prompt.cut_tokens} tokens too long: its "
                    "beginning was cut off, as for every prompt that is too long",
                    {"kind": "prompt_cut", "row": row + 1, "cut_tokens": prompt.cut_tokens},
                )
            if prompt.changed_text:
                given, trained = prompt.changed_text
                self._warn_once(
                    f"the tokenizer cannot reproduce a completion of row {row + 1}: the row has "
                    f"{given!r:.80}, its tokens read {trained!r:.80}, and such tokens are trained "
                    "on; write texts as the tokenizer does, or take a model whose tokenizer keeps "
                    "every character",
                    {"kind": "text_changed", "row": row + 1},
                )
        return prompts

    def _warn_once(self, message: str, data: dict[str, Any]) -> None:
        if data["kind"] not in self._warned:
            self._warned.add(data["kind"])
            self._sink.event("warn", message, data)

    def rows_of_step(self, number: int) -> list[int]:
        """Numbers of the rows of step ``number``, from 0."""
        return [self._order.row(position) for position in self._plan.positions(number)]

    def _encode(self, row: int) -> Prompt:
        with naming_row(row):
            return self._encoder(self._rows[row])

    def epoch(self, number: int) -> float:
        """Passes over the data set after step ``number``."""
        return self._plan.end(number) / self._order.row_count


class EvaluationStream(PromptStream):
    """All rows of the data set in every step, in their order."""

    def rows_of_step(self, number: int) -> list[int]:  # noqa: ARG002 - every step is the same
        return list(range(len(self._rows)))

    def epoch(self, number: int) -> float:
        return float(number)
