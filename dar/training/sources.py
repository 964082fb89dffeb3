"""Where the scored completions of a step come from: sampled and scored now, or read from the data set."""

import math
import sys
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.rewards.base import RewardContext, RewardSample, SampleReward
from dar.rewards.scorer import RewardScorer, ScoringStoppedError
from dar.training import loading
from dar.training.config import DARConfig
from dar.training.data import Prompt, PromptEncoder, Rows, TokenPair
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
        config: K, and the longest completion.
        tokenizer: Makes text of completions.
        sink: Is told the phases.
    """

    def __init__(
        self,
        prompts: PromptStream,
        weigher: Weigher,
        config: DARConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sink: Sink,
    ) -> None:
        self._prompts = prompts
        self._weigher = weigher
        self._k = config.dar_k
        self._tokenizer = tokenizer
        self._sink = sink

    def __call__(self, number: int) -> ScoredStep:
        """Completions and rewards of step ``number`` from the data set; see `StepSource`.

        Raises:
            InvalidRequestError: A row has not K completions and rewards.
        """
        self._sink.phase("training", number)
        prompts = self._prompts.of_step(number)
        for prompt in prompts:
            self._check(prompt)
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

    def _check(self, prompt: Prompt) -> None:
        for name in ("completion_ids", "rewards", "behavior_logps"):
            values = prompt.columns.get(name)
            if name == "behavior_logps" and values is None:
                continue
            if values is None or len(values) != self._k:
                raise InvalidRequestError(
                    f"each row needs {self._k} {name} (dar_k is {self._k}), but the row of {prompt.text[:80]!r} has "
                    f"{'none' if values is None else len(values)}",
                    param="training_file",
                )
        if not all(prompt.columns["completion_ids"]):
            raise InvalidRequestError(
                f"a completion of {prompt.text[:80]!r} has no tokens", param="training_file"
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
        InvalidRequestError: A prompt and ``max_new_tokens`` do not fit into the model's context.
    """
    longest = config.max_length or loading.context_length(policy.model) or sys.maxsize
    prompt_length = config.max_prompt_length or longest - config.max_new_tokens
    if not 0 < prompt_length < longest:
        raise InvalidRequestError(
            f"a prompt and {config.max_new_tokens} new tokens do not fit into {longest} tokens, which is the most that "
            "max_length or the model allows; lower max_new_tokens",
            param="max_new_tokens",
        )
    tokenizer = policy.tokenizer
    stream = PromptStream(rows, PromptEncoder(tokenizer, prompt_length), config, sink)
    if scorer is None:
        return ReplaySource(stream, weigher, config, tokenizer=tokenizer, sink=sink)
    eos_ids = loading.eos_ids(policy.model, tokenizer)
    sampler = Sampler(config, tokenizer, eos_ids=eos_ids, max_length=longest)
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
