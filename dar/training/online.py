"""`OnlineSource`: completions of a step are sampled from the policy and scored."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from transformers import PreTrainedTokenizerBase

from dar.rewards.base import RewardContext, RewardSample, SampleReward
from dar.rewards.scorer import RewardScorer, ScoringStoppedError
from dar.training.data import Prompt, TokenPair
from dar.training.loading import LanguageModel
from dar.training.ranks import Ranks
from dar.training.sampling import Completion, Sampler
from dar.training.sharding import whole
from dar.training.sink import Control, Sink, StopRequestedError, check
from dar.training.steps import Mode, PromptStream, ScoredStep, Weigher


class OnlineSource:
    """Samples from the policy and has the completions scored.

    Each process samples for its share of the prompts; the main one has all completions scored, however long that takes.

    Args:
        model: The policy.
        prompts: The prompts of each step.
        sampler: Samples K completions of each.
        scorer: Gives rewards; None where this is not the main process.
        weigher: Turns them into weights.
        tokenizer: Makes text of completions.
        sink: Is told the phases.
        control: Is asked whether to go on.
        job_id: Named to reward services.
        mode: In an evaluation the number of a step is that of the steps done before, and the noise always that of step 0.
        ranks: The processes that sample together.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: PromptStream,
        sampler: Sampler,
        scorer: RewardScorer | None,
        weigher: Weigher,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sink: Sink,
        control: Control,
        job_id: str | None,
        ranks: Ranks,
        mode: Mode = "train",
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
        self._ranks = ranks
        self._mode: Mode = mode

    def __call__(self, number: int) -> ScoredStep:
        """Sample and score step ``number``; see `StepSource`.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion of the step could be scored.
            TrainingError: The policy gave a probability that is no number.
        """
        self._sink.phase("sampling" if self._mode == "train" else "evaluating", number)
        started = time.monotonic()
        prompts = self._prompts.of_step(number)
        completions = self._sample(number, prompts)
        texts = [
            str(self._tokenizer.decode(completion.ids, skip_special_tokens=True))
            for completion in completions
        ]
        sampled = time.monotonic()
        if self._mode == "train":
            self._sink.phase("waiting_for_reward", number)
        rewards = [
            SampleReward(**values)
            for values in self._ranks.from_main(
                lambda: [asdict(r) for r in self._score(number, prompts, completions, texts)]
            )
        ]
        scored = time.monotonic()
        if self._mode == "train":
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
            behavior_logps_B=torch.tensor(
                [completion.logp for completion in completions], dtype=torch.float64
            ),
            seconds={"sampling": sampled - started, "reward": scored - sampled},
        )
        return self._weigher(step, is_behavior_known=True)

    def _sample(self, number: int, prompts: Sequence[Prompt]) -> list[Completion]:
        share = self._ranks.slice(len(prompts))
        with whole(self._model):
            own = self._sampler.sample(
                self._model,
                [prompts[i].ids for i in share],
                step=number if self._mode == "train" else 0,
                first_prompt=share.start,
                before_each=self._look_out,
            )
        shares = self._ranks.gather([asdict(completion) for completion in own])
        return [Completion(**values) for values in itertools.chain(*shares)]

    def _look_out(self) -> None:
        check(self._control)
        self._ranks.look()

    def _should_stop(self) -> bool:
        """Asked by the main process while it waits for rewards; what another one has failed with is raised from here."""
        self._ranks.look()
        return self._control.requested() is not None

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
                prompt_text=prompts[row // k].text,
            )
            for row, (completion, text) in enumerate(zip(completions, texts, strict=True))
        ]
        assert self._scorer is not None
        try:
            totals = self._scorer.score(
                samples,
                RewardContext(step=number, mode=self._mode, job_id=self._job_id),
                should_stop=self._should_stop,
            )
        except ScoringStoppedError:
            raise StopRequestedError from None
        if self._mode == "train":
            self._scorer.combination.end_step(number)
        return totals
