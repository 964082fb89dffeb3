"""Where the scored completions of a step come from: sampled and scored now, or read from the data set."""

import math
import sys
import time
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from transformers import PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.rewards.base import RewardContext, RewardSample, SampleReward
from dar.rewards.scorer import RewardScorer, ScoringStoppedError
from dar.training import loading
from dar.training.config import DARConfig
from dar.training.data import Prompt, PromptEncoder, Row, Rows, TokenPair
from dar.training.loading import LanguageModel
from dar.training.policy import Policy
from dar.training.sampling import Completion, Sampler
from dar.training.sink import Control, Sink, StopRequestedError, check
from dar.training.steps import PromptStream, ScoredStep, Weigher


class OnlineSource:
    """Samples from the policy and has the completions scored.

    Args:
        model: The policy.
        prompts: The prompts of each step.
        sampler: Samples K completions of each.
        scorer: Gives rewards.
        weigher: Turns them into weights.
        tokenizer: Makes text of completions.
        sink: Is told the phases.
        control: Is asked whether to go on.
        job_id: Named to reward services.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: PromptStream,
        sampler: Sampler,
        scorer: RewardScorer,
        weigher: Weigher,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sink: Sink,
        control: Control,
        job_id: str | None,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._sampler = sampler
        self._scorer = scorer
        self._weigher = weigher
        self._tokenizer = tokenizer
        self._sink = sink
        self._control = control
        self._job_id = job_id

    def __call__(self, number: int) -> ScoredStep:
        """Sample and score step ``number``; see `StepSource`.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: The policy gave a probability that is no number.
        """
        self._sink.phase("sampling", number)
        started = time.monotonic()
        prompts = self._prompts.of_step(number)
        completions = self._sampler.sample(
            self._model,
            [prompt.ids for prompt in prompts],
            step=number,
            before_each=lambda: check(self._control),
        )
        texts = [
            str(self._tokenizer.decode(completion.ids, skip_special_tokens=True))
            for completion in completions
        ]
        sampled = time.monotonic()
        self._sink.phase("waiting_for_reward", number)
        rewards = self._score(number, prompts, completions, texts)
        scored = time.monotonic()
        self._sink.phase("training", number)
        k = len(completions) // len(prompts)
        step = ScoredStep(
            number=number,
            epoch=self._prompts.epoch(number),
            prompts=prompts,
            pairs=[
                TokenPair(prompts[row // k].ids, completion.ids)
                for row, completion in enumerate(completions)
            ],
            texts=texts,
            finish_reasons=[completion.finish_reason for completion in completions],
            rewards=rewards,
            behavior_logps_B=torch.tensor([completion.logp for completion in completions]),
            seconds={"sampling": sampled - started, "reward": scored - sampled},
        )
        return self._weigher(step, is_behavior_known=True)

    def _score(
        self,
        number: int,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        texts: Sequence[str],
    ) -> list[SampleReward]:
        k = len(completions) // len(prompts)
        samples = [
            RewardSample(
                id=f"s{row}",
                group_id=f"g{row // k}",
                index=row % k,
                prompt=None if prompts[row // k].messages else prompts[row // k].text,
                messages=prompts[row // k].messages,
                completion=text,
                finish_reason=completion.finish_reason,
                completion_tokens=len(completion.ids),
                completion_ids=completion.ids,
                columns=prompts[row // k].columns,
            )
            for row, (completion, text) in enumerate(zip(completions, texts, strict=True))
        ]
        try:
            return self._scorer.score(
                samples,
                RewardContext(step=number, job_id=self._job_id),
                should_stop=lambda: self._control.requested() is not None,
            )
        except ScoringStoppedError:
            raise StopRequestedError from None


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


def make_source(
    policy: Policy,
    config: DARConfig,
    rows: Rows,
    weigher: Weigher,
    *,
    scorer: RewardScorer | None,
    job_id: str | None,
    sink: Sink,
    control: Control,
) -> OnlineSource | ReplaySource:
    """The step source of a training run: online with a scorer, offline without one.

    Raises:
        InvalidRequestError: A row cannot be used, or a prompt and ``max_new_tokens`` do not fit into the model's context.
        TrainingError: The model cannot be sampled from.
    """
    tokenizer = policy.tokenizer
    context = loading.context_length(policy.model) or sys.maxsize
    longest = min(config.max_length or context, context)
    if scorer is None:
        room = check_replay(rows, config.dar_k, vocabulary=policy.vocabulary, longest=longest)
        encoder = PromptEncoder(
            tokenizer, min(config.max_prompt_length or room, room), is_replay=True
        )
        stream = PromptStream(rows, encoder, config, sink)
        return ReplaySource(stream, weigher, config.dar_k, tokenizer=tokenizer, sink=sink)
    prompt_length = config.max_prompt_length or longest - config.max_new_tokens
    if not 0 < prompt_length < longest:
        raise InvalidRequestError(
            f"a prompt and {config.max_new_tokens} new tokens do not fit into {longest} tokens, which is the most that "
            "max_length or the model allows; lower max_new_tokens",
            param="max_new_tokens",
        )
    stream = PromptStream(rows, PromptEncoder(tokenizer, prompt_length), config, sink)
    eos_ids = loading.eos_ids(policy.model, tokenizer)
    sampler = Sampler(config, tokenizer, eos_ids=eos_ids, max_length=longest)
    sampler.check(policy.model)
    return OnlineSource(
        policy.model,
        stream,
        sampler,
        scorer,
        weigher,
        tokenizer=tokenizer,
        sink=sink,
        control=control,
        job_id=job_id,
    )
