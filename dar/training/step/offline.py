"""Offline training: completions and rewards of a step are read from the data set."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.protocol.rows import (
    OFFLINE_COLUMNS,
    Completion,
    Message,
    OfflineRow,
    Row,
    RowError,
    read_offline,
)
from dar.rewards.base import SampleReward
from dar.training.data.rows import (
    Prompt,
    PromptEncoder,
    Rows,
    StoredCompletion,
    TokenPair,
    common_length,
    naming_row,
)
from dar.training.report.sink import Sink
from dar.training.sampling.prompts import PromptStream
from dar.training.step.records import Mode, ScoredStep, Weigher
from dar.training.step.reward_feed import StepInProgress


class RowEncoder(PromptEncoder):
    """Turns rows with completions into token ids.

    A completion's tokens are those that follow the prompt's when both are encoded as one text, as
    the policy samples them; an end-of-sequence token is appended if there is none. A conversation
    is rendered by the chat template together with the assistant's turn. Token ids are used as they
    are.

    If prompt and completion together are longer than ``longest``, first the prompt is cut from the
    left, down to ``longest // 2`` tokens (see `dar.training.data.PromptEncoder`), then the
    completion from the right. Token ids of completions are never cut. Nothing depends on the other
    rows.

    Args:
        tokenizer: The trained model's.
        max_prompt_length: Longest prompt in tokens; None: limited only by ``longest``.
        longest: Most tokens of prompt and completion together.
        vocabulary: Number of tokens of the model.
        eos_ids: Tokens that end a completion.
        variables: Variables of the chat template, where a row has no others.
    """

    own_columns = OFFLINE_COLUMNS

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int | None,
        *,
        longest: int,
        vocabulary: int,
        eos_ids: Collection[int],
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, max_prompt_length or longest, variables)
        self._longest = longest
        self.vocabulary = vocabulary
        self._eos_ids = frozenset(eos_ids)

    def __call__(self, row: Row) -> Prompt:
        """Encode one row, its completions included.

        Raises:
            InvalidRequestError: The row cannot be trained on, or does not fit the model's chat
                template.
        """
        found, variables = read_offline(row, self.vocabulary), self.variables_of(row)
        if found.prompt_ids is not None:
            ids = found.prompt_ids
        else:
            assert found.prompt is not None
            ids = self.encoded(found.prompt, variables)
        completions = [
            self._completion_ids(found.prompt, ids, one, variables) for one in found.completions
        ]
        longest_completion = max(map(len, completions))
        if min(map(len, completions)) == 0:
            raise RowError(
                "a completion has 0 tokens, and the tokenizer has no EOS token to end it with",
                "completion",
            )
        room = self._longest - longest_completion
        if found.kind == "tokens" and room < 1:
            raise RowError(
                f"a completion has {longest_completion} tokens, but must have at least 1 and fewer "
                f"than {self._longest}",
                "completion_ids",
            )
        if found.kind != "tokens":
            room = max(room, self._longest // 2)
        prompt = self.fitted(row, found.prompt, ids, min(room, self._max_length))
        return replace(prompt, completions=self._stored(found, completions, len(prompt.ids)))

    def check(self, row: Row) -> None:
        """Check a row without encoding it if possible; see `dar.training.data.PromptEncoder`."""
        found = read_offline(row, self.vocabulary)
        prompt = found.prompt
        if prompt is None or isinstance(prompt, str):
            self(row)
            return
        variables = self.variables_of(row)
        answers = [
            self._answer(prompt, one, variables)[1]
            for one in found.completions
            if not isinstance(one, str | list)
        ]
        longest = min(self._max_length, self._longest // 2)
        if not all(answers) or self._needs_tokens(
            prompt, self.rendered(prompt, variables), longest
        ):
            self(row)

    def _stored(
        self, row: OfflineRow, completions: Sequence[list[int]], prompt_length: int
    ) -> tuple[StoredCompletion, ...]:
        room = self._longest - prompt_length
        if row.behavior_logps is not None and max(map(len, completions)) > room:
            raise RowError(
                f"a completion of {max(map(len, completions))} tokens must be cut to {room}, and "
                "then its behavior_logps do not fit it any more; raise max_length, shorten it, or "
                "leave behavior_logps out of all rows",
                "behavior_logps",
            )
        known: Sequence[float | None] = row.behavior_logps or [None] * len(completions)
        return tuple(
            StoredCompletion(
                ids=ids[:room],
                finish_reason="stop" if len(ids) <= room and self._is_ended(ids) else "length",
                reward=reward,
                behavior_logp=logp,
            )
            for ids, reward, logp in zip(completions, row.rewards, known, strict=True)
        )

    def _is_ended(self, ids: Sequence[int]) -> bool:
        return not self._eos_ids or ids[-1] in self._eos_ids

    # --- tokens of a completion ----------------------------------------------------------------

    def _completion_ids(
        self,
        prompt: str | Sequence[Message] | None,
        prompt_ids: list[int],
        completion: Completion,
        variables: Mapping[str, Any],
    ) -> list[int]:
        if isinstance(completion, list):
            return completion
        if isinstance(completion, str):
            assert isinstance(prompt, str)
            return self._ended(
                self._following(prompt_ids, self._plain(prompt + completion), completion)
            )
        assert prompt is not None
        assert not isinstance(prompt, str)
        return self._ended(self._turn(prompt, prompt_ids, completion, variables))

    def _following(self, prompt_ids: list[int], whole: list[int], text: str) -> list[int]:
        """Tokens of ``text`` after the prompt; encoded alone if a token would span both."""
        count = len(prompt_ids)
        return whole[count:] if common_length(prompt_ids, whole) == count else self.bare(text)

    def _answer(
        self, prompt: Sequence[Message], answer: Message, variables: Mapping[str, Any]
    ) -> tuple[str, str]:
        """The rendered conversation with its answer, and the part that follows the prompt."""
        before = self.rendered(prompt, variables)
        last = prompt[-1]
        if last["role"] == "assistant":  # the answer continues the prompt's last message
            whole = [*prompt[:-1], {**answer, "content": last["content"] + answer["content"]}]
        else:
            whole = [*prompt, answer]
        text = self.rendered(whole, variables, is_whole=True)
        if not text.startswith(before):
            at = common_length(map(ord, before), map(ord, text))
            raise InvalidRequestError(
                "the model's chat template writes the prompt differently when the answer follows: "
                f"alone it has {before[at : at + 40]!r} where with the answer it has "
                f"{text[at : at + 40]!r}. The policy would be trained on another prompt than it "
                "samples from; use a template that only appends, or send prompt_ids and "
                "completion_ids"
            )
        return text, text[len(before) :]

    def _turn(
        self,
        prompt: Sequence[Message],
        prompt_ids: list[int],
        answer: Message,
        variables: Mapping[str, Any],
    ) -> list[int]:
        text, rest = self._answer(prompt, answer, variables)
        ids = self._following(prompt_ids, self.bare(text), rest)
        ends = [place for place, token in enumerate(ids) if token in self._eos_ids]
        # Templates append a line break to the end of a turn; sampling stops before it.
        if ends and not str(self._tokenizer.decode(ids[ends[-1] + 1 :])).strip():
            return ids[: ends[-1] + 1]
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        if not self._eos_ids or (ids and ids[-1] in self._eos_ids):
            return ids
        eos: int | None = self._tokenizer.eos_token_id
        return [*ids, min(self._eos_ids) if eos is None else eos]


class ReplaySource:
    """Reads completions and rewards from the data set: offline training.

    The number of completions may differ between rows. If any row lacks ``behavior_logps``, the
    current policy's log-probabilities are used.

    Args:
        prompts: The prompts of each step, with their completions.
        weigher: Turns rewards into weights.
        tokenizer: Decodes completions.
        sink: Receives the phases.
        mode: Whether the steps are trained or evaluated on.
    """

    def __init__(
        self,
        prompts: PromptStream,
        weigher: Weigher,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sink: Sink,
        mode: Mode = "train",
    ) -> None:
        self._prompts = prompts
        self._weigher = weigher
        self._tokenizer = tokenizer
        self._sink = sink
        self._mode = mode

    def begin(
        self,
        number: int,
        *,
        staleness: int = 0,  # noqa: ARG002 - only sampled steps are stale
        stored: object = None,  # noqa: ARG002 - only sampled steps are stored
    ) -> StepInProgress:
        """Step ``number`` with its rewards; see `dar.training.step.pipeline.Pipeline`."""
        return StepInProgress(self(number))

    def __call__(self, number: int) -> ScoredStep:
        """Completions and rewards of step ``number`` from the data set; see `StepSource`."""
        self._sink.phase("training" if self._mode == "train" else "evaluating", number)
        prompts = self._prompts.of_step(number)
        stored = [(prompt, one) for prompt in prompts for one in prompt.completions]
        known = [one.behavior_logp for _, one in stored]
        step = ScoredStep(
            number=number,
            epoch=self._prompts.epoch(number),
            prompts=prompts,
            pairs=[TokenPair(prompt.ids, one.ids) for prompt, one in stored],
            texts=[
                str(self._tokenizer.decode(one.ids, skip_special_tokens=True)) for _, one in stored
            ],
            finish_reasons=[one.finish_reason for _, one in stored],
            rewards=[_given(one.reward) for _, one in stored],
            behavior_logps_B=torch.tensor(
                [math.nan if logp is None else logp for logp in known], dtype=torch.float64
            ),
            counts=[len(prompt.completions) for prompt in prompts],
            staleness=None,
        )
        return self._weigher(step, is_behavior_known=None not in known)


def check_replay(rows: Rows, encoder: RowEncoder, prompts_per_step: int) -> None:
    """Reject rows that cannot be replayed, before the first step.

    Args:
        rows: The data set.
        encoder: Encodes its rows.
        prompts_per_step: Rows of an optimizer step.

    Raises:
        InvalidRequestError: A row cannot be encoded (the message names it), or no completion would
            have another to be compared with.
    """
    most = 0
    for index in range(len(rows)):
        row = rows[index]
        with naming_row(index):
            found = read_offline(row, encoder.vocabulary)
            most = max(most, len(found.completions))
            # `PromptStream` checks all rows with conversations; only empty texts can fail.
            is_doubtful = found.behavior_logps is not None or "" in (
                found.prompt,
                *found.completions,
            )
            if found.kind == "tokens" or is_doubtful:
                encoder(row)
    if most == 1 and prompts_per_step == 1:
        raise InvalidRequestError(
            "every row holds one completion and a step takes one row, so nothing can be compared "
            "and every advantage would be 0; set the batch size to at least 2",
            param="per_device_train_batch_size",
        )


def _given(reward: float | None) -> SampleReward:
    if reward is None:
        return SampleReward(None, "skip", None, {})
    return SampleReward(reward, "reward", None, {})
