"""Offline training: completions and rewards of a step are read from the data set."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.protocol.row_files import OfflineRewards
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
from dar.training.data.codec import Encoded, TextCodec, common_length
from dar.training.data.rows import (
    Prompt,
    PromptEncoder,
    Rows,
    StoredCompletion,
    TokenPair,
    naming_row,
)
from dar.training.run_context import RunContext
from dar.training.sampling.prompts import PromptStream
from dar.training.step.records import PHASES, Mode, ScoredStep, Weigher
from dar.training.step.reward_feed import StepInProgress


class RowEncoder(PromptEncoder):
    """Turns rows with completions into token ids.

    A completion's tokens are those that follow the prompt's when both are encoded as one text, as
    the policy samples them; an end-of-sequence token is appended if there is none. They decode to
    exactly the text of the row, or `dar.training.data.rows.Prompt.changed_text` shows what they
    decode to (see `dar.training.data.codec.TextCodec.after`). A conversation is rendered by the
    chat template together with the assistant's turn. Token ids are used as they are.

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
        added = self._codec.added_tokens
        self._eos_texts = tuple(added[one].content for one in eos_ids if one in added)

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
            self._encoded(found.prompt, ids, one, variables) for one in found.completions
        ]
        lengths = [len(one.ids) for one in completions]
        longest_completion = max(lengths)
        if min(lengths) == 0:
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
        longest = min(room, self._max_length)
        prompt = self.fitted(row, found.prompt, ids, longest)
        fitted = [
            one
            if one.prompt_ids is None
            else replace(
                one, prompt_ids=self.fitted(row, found.prompt, one.prompt_ids, longest).ids
            )
            for one in completions
        ]
        return replace(
            prompt,
            completions=self._stored(found, fitted, len(prompt.ids)),
            changed_text=next((one.changed_text for one in completions if one.changed_text), None),
            is_preference=found.kind == "preferences",
        )

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
        self, row: OfflineRow, completions: Sequence[Encoded], prompt_length: int
    ) -> tuple[StoredCompletion, ...]:
        known: Sequence[float | None] = row.behavior_logps or [None] * len(completions)
        stored = []
        for one, reward, logp in zip(completions, row.rewards, known, strict=True):
            before = prompt_length if one.prompt_ids is None else len(one.prompt_ids)
            room, length = self._longest - before, len(one.ids)
            if logp is not None and length > room:
                raise RowError(
                    f"a completion of {length} tokens must be cut to {room}, and then its "
                    "behavior_logps do not fit it any more; raise max_length, shorten it, or leave "
                    "behavior_logps out of all rows",
                    "behavior_logps",
                )
            stored.append(
                StoredCompletion(
                    ids=one.ids[:room],
                    finish_reason="stop"
                    if length <= room and self._is_ended(one.ids)
                    else "length",
                    reward=reward,
                    behavior_logp=logp,
                    prompt_ids=one.prompt_ids,
                )
            )
        return tuple(stored)

    def _is_ended(self, ids: Sequence[int]) -> bool:
        return not self._eos_ids or ids[-1] in self._eos_ids

    # --- tokens of a completion ----------------------------------------------------------------

    def _encoded(
        self,
        prompt: str | Sequence[Message] | None,
        prompt_ids: list[int],
        completion: Completion,
        variables: Mapping[str, Any],
    ) -> Encoded:
        if isinstance(completion, list):
            return Encoded(completion)
        if isinstance(completion, str):
            assert isinstance(prompt, str)
            text = prompt + completion
            encoded = self._codec.after(prompt_ids, self._plain(text), completion, text)
        else:
            assert prompt is not None
            assert not isinstance(prompt, str)
            encoded = self._turn(prompt, prompt_ids, completion, variables)
        return replace(encoded, ids=self._ended(encoded.ids))

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
    ) -> Encoded:
        text, rest = self._answer(prompt, answer, variables)
        # Templates append a line break to the end of a turn; sampling stops before it.
        kept = rest.rstrip()
        if kept.endswith(self._eos_texts):
            text, rest = text[: len(text) - len(rest) + len(kept)], kept
        encoded = self._codec.after(prompt_ids, self.bare(text), rest, text)
        ids = encoded.ids
        ends = [place for place, token in enumerate(ids) if token in self._eos_ids]
        if ends and not self._codec.decode(ids[ends[-1] + 1 :]).strip():
            ids = ids[: ends[-1] + 1]
        return replace(encoded, ids=ids)

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
        run: The training run.
        prompts: The prompts of each step, with their completions.
        weigher: Turns rewards into weights.
        tokenizer: Decodes completions.
        mode: Whether the steps are trained on, evaluated on or calibrated with.
    """

    def __init__(
        self,
        run: RunContext,
        prompts: PromptStream,
        weigher: Weigher,
        *,
        tokenizer: PreTrainedTokenizerBase,
        mode: Mode = "train",
    ) -> None:
        self._run = run
        self._prompts = prompts
        self._weigher = weigher
        self._codec = TextCodec(tokenizer)
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
        self._run.phase("training" if self._mode == "train" else PHASES[self._mode])
        prompts = self._prompts.of_step(number)
        stored = [(prompt, one) for prompt in prompts for one in prompt.completions]
        known = [one.behavior_logp for _, one in stored]
        step = ScoredStep(
            number=number,
            epoch=self._prompts.epoch(number),
            prompts=prompts,
            pairs=[TokenPair(one.prompt_ids or prompt.ids, one.ids) for prompt, one in stored],
            texts=[self._codec.text(one.ids) for _, one in stored],
            finish_reasons=[one.finish_reason for _, one in stored],
            rewards=[_given(one.reward) for _, one in stored],
            behavior_logps_B=torch.tensor(
                [math.nan if logp is None else logp for logp in known], dtype=torch.float64
            ),
            counts=[len(prompt.completions) for prompt in prompts],
            staleness=None,
        )
        return self._weigher(step, is_behavior_known=None not in known)


def check_replay(rows: Rows, encoder: RowEncoder, prompts_per_step: int, mode: Mode) -> None:
    """Reject rows that cannot be replayed, before the first step.

    Args:
        rows: The data set.
        encoder: Encodes its rows.
        prompts_per_step: Rows of an optimizer step.
        mode: Whether they are trained or evaluated on.

    Raises:
        InvalidRequestError: A row cannot be encoded (the message names it), there are no rewards,
            or no completion would have another to be compared with.
    """
    most, rewards = 0, OfflineRewards()
    for index in range(len(rows)):
        row = rows[index]
        with naming_row(index):
            found = read_offline(row, encoder.vocabulary)
            most = max(most, len(found.completions))
            rewards.add(found)
            # `PromptStream` checks all rows with conversations; only empty texts can fail.
            is_doubtful = found.behavior_logps is not None or "" in (
                found.prompt,
                *found.completions,
            )
            if found.kind == "tokens" or is_doubtful:
                encoder(row)
    which = "train_dataset" if mode == "train" else "eval_dataset"
    if mode == "train" and not rewards.are_comparable:
        raise InvalidRequestError(
            f"{which}: no completion has another one to be compared with: give at least two "
            "completions of one row, or the only completions of two rows, a reward",
            param=which,
            code="no_rewards",
        )
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
