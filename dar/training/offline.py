"""`ReplaySource`: completions and rewards of a step are read from the data set."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from transformers import PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.rewards.base import SampleReward
from dar.training.data import Row, Rows, TokenPair
from dar.training.sink import Sink
from dar.training.steps import PromptStream, ScoredStep, Weigher


class ReplaySource:
    """Reads completions and rewards from the data set: offline training.

    Rows hold ``completion_ids`` (K lists of token ids, to which nothing is appended), ``rewards`` (K numbers or null) and
    perhaps ``behavior_logps`` (K numbers); without the last, the policy as it is stands for what sampled.

    Args:
        prompts: The prompts of each step.
        weigher: Turns rewards into weights.
        k: Completions of each row.
        tokenizer: Makes text of completions.
        sink: Is told the phases.
    """

    def __init__(
        self,
        prompts: PromptStream,
        weigher: Weigher,
        k: int,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sink: Sink,
    ) -> None:
        self._prompts = prompts
        self._weigher = weigher
        self._k = k
        self._tokenizer = tokenizer
        self._sink = sink

    def __call__(self, number: int) -> ScoredStep:
        """Completions and rewards of step ``number`` from the data set; see `StepSource`."""
        self._sink.phase("training", number)
        prompts = self._prompts.of_step(number)
        pairs = [
            TokenPair(prompt.ids, list(ids))
            for prompt in prompts
            for ids in prompt.columns["completion_ids"]
        ]
        known = [prompt.columns.get("behavior_logps") for prompt in prompts]
        is_behavior_known = all(logps is not None for logps in known)
        behavior_logps = [logp for logps in known for logp in (logps or [math.nan] * self._k)]
        step = ScoredStep(
            number=number,
            epoch=self._prompts.epoch(number),
            prompts=prompts,
            pairs=pairs,
            texts=[
                str(self._tokenizer.decode(list(pair.completion_ids), skip_special_tokens=True))
                for pair in pairs
            ],
            finish_reasons=["stop"] * len(pairs),
            rewards=[_given(reward) for prompt in prompts for reward in prompt.columns["rewards"]],
            behavior_logps_B=torch.tensor(behavior_logps, dtype=torch.float32),
        )
        return self._weigher(step, is_behavior_known=is_behavior_known)


def check_replay(rows: Rows, k: int, *, vocabulary: int, longest: int) -> int:
    """Refuse rows that cannot be replayed, before the first step.

    Args:
        rows: The data set.
        k: Completions of each row.
        vocabulary: Token ids are below it.
        longest: Longest prompt + completion, in tokens.

    Returns:
        Tokens that the longest completion leaves for a prompt; at least 1.

    Raises:
        InvalidRequestError: A row has not K completions, rewards and log-probabilities that are such; the message names it.
    """
    room = longest
    for index in range(len(rows)):
        row = rows[index]
        problem = _replay_problem(row, k, vocabulary, longest)
        if problem:
            raise InvalidRequestError(f"row {index + 1}: {problem}", param="training_file")
        room = min(room, longest - max(map(len, row["completion_ids"])))
    return room


def _replay_problem(row: Row, k: int, vocabulary: int, longest: int) -> str | None:
    for name in ("completion_ids", "rewards", "behavior_logps"):
        values = row.get(name)
        if values is None and name == "behavior_logps":
            continue
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != k:
            return f"needs {k} {name} (dar_k is {k}), but has {values!r:.80}"
    if not all(reward is None or _is_number(reward) for reward in row["rewards"]):
        return f"rewards must be numbers or null, not {row['rewards']!r:.80}"
    logps = row.get("behavior_logps") or ()
    if not all(_is_number(logp) and math.isfinite(logp) for logp in logps):
        return f"behavior_logps must be finite numbers, or left out for the whole row, not {logps!r:.80}"
    for ids in (row.get("prompt_ids"), *row["completion_ids"]):
        if ids is not None and not _are_tokens(ids, vocabulary):
            return (
                f"token ids must be a list of integers from 0 to {vocabulary - 1}, not {ids!r:.80}"
            )
    for ids in row["completion_ids"]:
        if not 0 < len(ids) < longest:
            return f"a completion has {len(ids)} tokens, but must have at least 1 and fewer than {longest}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_tokens(ids: object, vocabulary: int) -> bool:
    return isinstance(ids, Sequence) and all(
        isinstance(token, Integral) and 0 <= int(token) < vocabulary for token in ids
    )


def _given(reward: float | None) -> SampleReward:
    if reward is None or not math.isfinite(reward):
        return SampleReward(None, "skip", None, {})
    return SampleReward(float(reward), "reward", None, {})
