"""`OnlineSource`: completions of a step are sampled from the policy and scored."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dar.rewards.base import RewardContext, RewardSample, SampleReward
from dar.rewards.scorer import RewardScorer, ScoringStoppedError
from dar.training.data import Prompt, TokenPair
from dar.training.loading import LanguageModel
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
